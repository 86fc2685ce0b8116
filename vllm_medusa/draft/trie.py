"""The tree of several continuations of a text, for all requests of a batch at once.

Continuations are sorted; then those with a common beginning are neighbours, and a cell of the table
[depth, continuation] is a new node where the beginning differs from the neighbour's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_medusa.draft.text_index import NO_TOKEN
from vllm_medusa.draft.types import Bools, Floats, Ints


@dataclass(frozen=True)
class Trie:
    """The trees of B requests out of their continuations: n nodes, in the order of their depths.

    Attributes:
        request, parents, tokens, depths: [n] as those of `Candidates`.
        count: [n] continuations that go through each node.
        weight: [n] sum of their weights.
        total: [n] sum of the weights of those that go through its parent.
        match: [n] the longest match among them.
        is_best: [n] whether the best continuation that goes through the parent goes on here.
        nodes: [D, rows] node of each cell of the table; what ended cells hold means nothing.
        is_new: [D, rows] whether the cell is the first of its node.

    """

    request: Ints
    parents: Ints
    tokens: Ints
    depths: Ints
    count: Ints
    weight: Floats
    total: Floats
    match: Ints
    is_best: Bools
    nodes: Ints
    is_new: Bools

    def along_paths(self, given: Floats) -> Floats:
        """Return [n] the product of [n] numbers along each node's path."""
        # Ended cells read one of them or, where there is none at all, the one more.
        cells = np.append(given, 1.0)[self.nodes]
        paths: Floats = np.multiply.accumulate(cells, axis=0)[self.is_new]
        return paths


def build_trie(
    request: Ints, continuations: NDArray[np.int32], weight: Floats, match: Ints, num_requests: int
) -> Trie:
    """Build the trees.

    Args:
        request: [rows] request of each continuation, rising.
        continuations: [rows, D] int32; each ends at its first `NO_TOKEN`.
        weight: [rows] of each continuation.
        match: [rows] tokens before it that agree with the request's last ones; of the best of a
            request's continuations the first counts.
        num_requests: B.

    """
    order, is_new = _sorted_beginnings(request, continuations)
    rows, depth = continuations.shape
    tokens = continuations[order].T
    cells = np.logical_and.accumulate(tokens != NO_TOKEN, axis=0)
    is_new &= cells
    cells, flat = cells.ravel(), is_new.ravel()
    nodes = (np.cumsum(flat) - 1).reshape(depth, rows)
    # Cells are in the order of their nodes, so a node's cells are one piece of them.
    starts = np.flatnonzero(flat[cells])
    places = np.broadcast_to(order, (depth, rows)).ravel()[cells]
    parents = np.full((depth, rows), -1)
    parents[1:] = nodes[:-1]
    parents = parents[is_new]
    node_request = np.broadcast_to(request[order], (depth, rows))[is_new]
    node_weight = np.add.reduceat(weight[places], starts)
    # The best continuation of a node is the first that was given.
    best = np.minimum.reduceat(places, starts)
    totals = np.bincount(request, weights=weight, minlength=num_requests)
    firsts = np.searchsorted(request, node_request)
    above = parents >= 0
    return Trie(
        request=node_request,
        parents=parents,
        tokens=tokens[is_new].astype(np.int64),
        depths=np.repeat(np.arange(1, depth + 1), is_new.sum(axis=1)),
        count=np.diff(starts, append=len(places)),
        weight=node_weight,
        total=np.where(above, node_weight[parents], totals[node_request]),
        match=np.maximum.reduceat(match[places], starts),
        is_best=best == np.where(above, best[parents], firsts),
        nodes=nodes,
        is_new=is_new,
    )


def _sorted_beginnings(request: Ints, continuations: NDArray[np.int32]) -> tuple[Ints, Bools]:
    """Order of the rows, and [D, rows] whether a cell's beginning is new, in that order."""
    rows, depth = continuations.shape
    keys = np.empty((rows, depth + 1), dtype=np.int32)
    keys[:, 0] = request
    keys[:, 1:] = continuations
    # As bytes they sort in one go. The order is an odd one, but equal beginnings are together.
    order = keys.view(f"S{keys.itemsize * (depth + 1)}").ravel().argsort(kind="stable")
    keys = keys[order]
    is_new = np.ones((depth, rows), dtype=np.bool_)
    same = np.logical_and.accumulate(keys[1:] == keys[:-1], axis=1)
    np.logical_not(same[:, 1:].T, out=is_new[:, 1:])
    return order, is_new
