"""Accepted nodes by source against a walk of each tree."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_medusa.draft.accepted import accepted_by_source
from vllm_medusa.draft.types import Drafts, Source


def random_drafts(rng: random.Random) -> Drafts:
    """Trees of few tokens, so that equal ones stand below different parents; some of no nodes."""
    rows: list[tuple[int, int, int]] = []
    starts = [0]
    for _ in range(rng.randint(1, 5)):
        taken: set[tuple[int, int]] = set()
        for _ in range(rng.randint(0, 15)):
            name = (rng.randint(0, len(taken)), rng.randint(0, 3))
            if name not in taken:
                taken.add(name)
                rows.append((*name, rng.randint(1, 7)))
        starts.append(len(rows))
    parents, tokens, source = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
    unused = np.zeros(len(rows))
    return Drafts(tokens, parents, unused.astype(np.int64), unused, source, np.array(starts))


@given(seed=st.integers(0, 100_000))
def test_counts_are_those_of_a_walk(seed: int) -> None:
    rng = random.Random(seed)
    drafts = random_drafts(rng)
    requests = rng.sample(range(len(drafts)), rng.randint(0, len(drafts)))
    accepted: list[list[int]] = []
    expected = dict.fromkeys(Source, 0)
    for request in requests:
        draft, node = drafts[request], 0
        accepted.append([])
        while children := [c for c, parent in enumerate(draft.parents, start=1) if parent == node]:
            if rng.random() < 0.2:
                break
            node = rng.choice(children)
            accepted[-1].append(int(draft.tokens[node - 1]))
            for source in Source:
                expected[source] += bool(draft.source[node - 1] & source)
    assert accepted_by_source(drafts, requests, accepted) == expected


def test_what_was_not_drafted_was_not_accepted() -> None:
    drafts = random_drafts(random.Random(1))
    with pytest.raises(ValueError, match="no path of a draft tree"):
        accepted_by_source(drafts, [0], [[9]])
