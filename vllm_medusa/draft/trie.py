"""The tree of several continuations of a text, for all requests of a batch at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_medusa.draft.compiled import compiled
from vllm_medusa.draft.text_index import NO_TOKEN
from vllm_medusa.draft.types import Bools, Floats, Ints

#: Value in place of a node: the root above a request's first nodes, and after a continuation's end.
ROOT, ENDED = -1, -2


class Trie(NamedTuple):
    """The trees of B requests out of their continuations: n nodes, in the order of their depths.

    Attributes:
        request, parents, tokens, depths: [n] as those of `Candidates`.
        count: [n] continuations that go through each node.
        weight: [n] sum of their weights.
        total: [n] sum of the weights of those that go through its parent.
        match: [n] the longest match among them.
        is_best: [n] whether the best continuation that goes through the parent goes on here.

    """

    request: Ints
    parents: Ints
    tokens: Ints
    depths: Ints
    count: Ints  # type: ignore[assignment]  # in place of a tuple's own
    weight: Floats
    total: Floats
    match: Ints
    is_best: Bools


@compiled
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
    rows, depth = continuations.shape
    size = rows * depth
    parents, first = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    depths, count = np.empty(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    weights, longest = np.zeros(size), np.zeros(size, dtype=np.int64)
    totals, best = np.zeros(num_requests), np.full(num_requests, rows)
    for row in range(rows):
        totals[request[row]] += weight[row]
        best[request[row]] = min(best[request[row]], row)
    # The node that each continuation goes through at the depth above.
    above = np.full(rows, ROOT)
    num_nodes = 0
    for level in range(depth):
        here = np.full(rows, ENDED)
        for row in range(rows):
            token = continuations[row, level]
            if above[row] == ENDED or token == NO_TOKEN:
                continue
            node, other = num_nodes, row - 1
            while other >= 0 and request[other] == request[row]:
                if above[other] == above[row] and continuations[other, level] == token:
                    node = here[other]
                    break
                other -= 1
            if node == num_nodes:
                num_nodes += 1
                parents[node], first[node], depths[node] = above[row], row, level + 1
            here[row] = node
            count[node] += 1
            weights[node] += weight[row]
            longest[node] = max(longest[node], match[row])
        above = here
    total, is_best = np.empty(num_nodes), np.empty(num_nodes, dtype=np.bool_)
    requests, tokens = np.empty(num_nodes, dtype=np.int64), np.empty(num_nodes, dtype=np.int64)
    for node in range(num_nodes):
        parent, row = parents[node], first[node]
        requests[node], tokens[node] = request[row], continuations[row, depths[node] - 1]
        total[node] = totals[request[row]] if parent == ROOT else weights[parent]
        is_best[node] = row == (best[request[row]] if parent == ROOT else first[parent])
    n = num_nodes
    nodes = requests, parents[:n], tokens, depths[:n], count[:n]
    return Trie(*nodes, weights[:n], total, longest[:n], is_best)
