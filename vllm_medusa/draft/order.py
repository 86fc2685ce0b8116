"""Depth-first order of drafts, in which a tree has the fewest fork paths: one for each leaf."""

from __future__ import annotations

import numpy as np

from vllm_medusa.draft.types import Drafts, Ints


def depth_first(drafts: Drafts) -> Drafts:
    """Return the drafts with each request's nodes in depth-first order, likelier children first.

    Every prefix is a tree in this order too; but a cut takes the last paths, not the least likely
    nodes.
    """
    if not len(drafts.tokens):
        return drafts
    starts = np.repeat(drafts.starts[:-1], drafts.num_nodes)
    # Places of the parents among all nodes, with one place more for each request's root.
    request = np.repeat(np.arange(len(drafts)), drafts.num_nodes)
    parent = np.where(drafts.parents > 0, starts + drafts.parents - 1, len(starts) + request)
    place = _places(parent, drafts.depths, len(starts) + len(drafts), drafts.starts)
    order = np.argsort(place)
    new_place = place - starts
    parents = np.where(drafts.parents > 0, new_place[np.minimum(parent, len(starts) - 1)] + 1, 0)
    return Drafts(
        tokens=drafts.tokens[order],
        parents=parents[order],
        depths=drafts.depths[order],
        probability=drafts.probability[order],
        source=drafts.source[order],
        starts=drafts.starts,
    )


def _places(parent: Ints, depths: Ints, num_places: int, starts: Ints) -> Ints:
    """[T] place of each node in depth-first order: behind its parent and earlier siblings' trees.

    Args:
        parent: [T] place of each node's parent; those behind T are roots.
        depths: [T].
        num_places: nodes and roots together.
        starts: [B + 1] first node of each request.

    """
    num_nodes = len(parent)
    levels = [np.flatnonzero(depths == depth) for depth in range(1, int(depths.max()) + 1)]
    size = np.ones(num_places, dtype=np.int64)
    for level in reversed(levels):
        np.add.at(size, parent[level], size[level])
    # Nodes by parent, in their order: a sum of sizes within each family is what stands before.
    family = np.argsort(parent, kind="stable")
    before = np.cumsum(size[family]) - size[family]
    is_first = np.append(True, parent[family][1:] != parent[family][:-1])
    before -= np.maximum.accumulate(np.where(is_first, before, 0))
    offset = np.empty(num_nodes, dtype=np.int64)
    offset[family] = before
    place = np.empty(num_places, dtype=np.int64)
    place[num_nodes:] = starts[:-1] - 1
    for level in levels:
        place[level] = place[parent[level]] + 1 + offset[level]
    return place[:num_nodes]
