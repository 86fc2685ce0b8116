"""Depth-first order of drafts, in which a tree has the fewest fork paths: one for each leaf."""

from __future__ import annotations

import numpy as np

from vllm_medusa.draft.compiled import compiled
from vllm_medusa.draft.types import Drafts, Ints


def depth_first(drafts: Drafts) -> Drafts:
    """Return the drafts with each request's nodes in depth-first order, likelier children first.

    In this order too, every prefix is a tree. But a cut removes the last paths, not the least
    probable nodes.
    """
    if not len(drafts.tokens):
        return drafts
    order, parents = _order(drafts.parents, drafts.starts)
    return Drafts(
        tokens=drafts.tokens[order],
        parents=parents,
        depths=drafts.depths[order],
        probability=drafts.probability[order],
        source=drafts.source[order],
        starts=drafts.starts,
    )


@compiled
def _order(parents: Ints, starts: Ints) -> tuple[Ints, Ints]:
    """[T] the nodes in depth-first order, and [T] their parents in it."""
    order, new_parents = np.empty(len(parents), np.int64), np.empty(len(parents), np.int64)
    for row in range(len(starts) - 1):
        start, count = starts[row], starts[row + 1] - starts[row]
        # By node, the root first: nodes of its tree, its new place, and its next child's.
        size, place = np.ones(count + 1, np.int64), np.zeros(count + 1, np.int64)
        for node in range(count, 0, -1):
            size[parents[start + node - 1]] += size[node]
        following = np.ones(count + 1, np.int64)
        for node in range(1, count + 1):
            parent = parents[start + node - 1]
            place[node] = following[parent]
            following[parent] += size[node]
            following[node] = place[node] + 1
            order[start + place[node] - 1] = start + node - 1
            new_parents[start + place[node] - 1] = place[parent]
    return order, new_parents
