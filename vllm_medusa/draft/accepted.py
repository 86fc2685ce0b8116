"""Which sources had proposed the nodes that a step accepted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from vllm_medusa.draft.compiled import compiled
from vllm_medusa.draft.types import Drafts, Ints, Source

NUM_SOURCES = len(Source)


def accepted_by_source(
    drafts: Drafts, requests: Sequence[int], accepted: Sequence[Sequence[int]]
) -> dict[Source, int]:
    """Count accepted nodes by source; a node of several sources counts for each.

    Args:
        drafts: what was drafted; parents come before their children.
        requests: places of n requests in ``drafts``.
        accepted: [n] tokens that each request accepted, one node below the other from the root on.

    Raises:
        ValueError: no path of a request's tree has these tokens.

    """
    ends = np.cumsum([len(tokens) for tokens in accepted], dtype=np.int64)
    counts = _count(
        *(drafts.tokens, drafts.parents, drafts.source, drafts.starts),
        np.array(requests, dtype=np.int64),
        np.fromiter(chain.from_iterable(accepted), np.int64, int(ends[-1]) if len(ends) else 0),
        ends,
    )
    return dict(zip(Source, counts.tolist(), strict=True))


@compiled
def _count(
    tokens: Ints,
    parents: Ints,
    source: Ints,
    starts: Ints,
    requests: Ints,
    accepted: Ints,
    ends: Ints,
) -> Ints:
    """[NUM_SOURCES] counts; those of request i are accepted[ends[i - 1] : ends[i]]."""
    counts = np.zeros(NUM_SOURCES, np.int64)
    begin = 0
    for place in range(len(requests)):
        start, stop = starts[requests[place]], starts[requests[place] + 1]
        node = 0  # in the numbering of parents: the root
        for token in accepted[begin : ends[place]]:
            child = start + node  # children come after their parent
            while child < stop and (tokens[child] != token or parents[child] != node):
                child += 1
            if child == stop:
                raise ValueError("no path of a draft tree has the tokens that were accepted of it")
            for bit in range(NUM_SOURCES):
                counts[bit] += source[child] >> bit & 1
            node = child - start + 1
        begin = ends[place]
    return counts
