"""The choice of the nodes of all requests that are drafted: those that pay.

A step emits one token per request, and in expectation as many more as the sum of the drafted nodes'
path probabilities. Tokens count by what they are worth to their requests (`speeds`). So the b most
valuable nodes are drafted, where b maximises the worth of the expected tokens / cost of the step.
Path probability falls along a path, so the b most valuable nodes are always complete trees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_medusa.draft.compiled import along_paths, compiled
from vllm_medusa.draft.merge import Nodes
from vllm_medusa.draft.types import Bools, Drafts, Floats, Ints

#: No limit on leaves.
UNLIMITED = 2**31


@dataclass(frozen=True)
class Ranked:
    """The nodes that may be drafted, request by request, the likeliest of each first.

    Attributes:
        drafts: all of them.
        request: [T] request of each node.
        order: [T] the nodes in falling worth, over all requests.
        weights: [B] worth of a token of each request.
        is_fork: [T] whether another child of its parent is more probable. Then the node begins
            another path of its request.

    """

    drafts: Drafts
    request: Ints
    order: Ints
    weights: Floats
    is_fork: Bools


def rank(
    nodes: Nodes,
    limits: Ints,
    max_leaves: Ints,
    *,
    weights: Floats | None = None,
    min_probability: float = 0.0,
) -> Ranked:
    """Put the nodes that may be drafted in order.

    Args:
        nodes: of B requests.
        limits: [B] most nodes of each request.
        max_leaves: [B] most leaves of each request's tree. The most probable forks are kept; the
            other forks and the nodes below them are left out.
        weights: [B] worth of a token of each request; None: all are worth 1.
        min_probability: nodes that are less likely are left out.

    """
    if weights is None:
        weights = np.ones(len(limits))
    tokens, parents, depths, probability, source, starts, request, order, is_fork = _ranked(
        *(nodes.ids, nodes.parents, nodes.request, nodes.tokens, nodes.depths),
        nodes.probability,
        *(nodes.source, limits, max_leaves, weights),
        nodes.num_ids,
        min_probability,
    )
    drafts = Drafts(tokens, parents, depths, probability, source, starts)
    return Ranked(drafts, request, order, weights, is_fork)


def best_size(
    ranked: Ranked, ms: Floats, fork_ms: float = 0.0, forking_ms: float = 0.0
) -> tuple[int, Floats]:
    """Return the best number of nodes, and [T + 1] worth per ms by number of nodes.

    Every number is tried with its forks. So a costly fork makes the next numbers worse, until the
    nodes below the fork outweigh its cost.

    Args:
        ranked: the nodes.
        ms: [at least T + 1] of the step, by its nodes.
        fork_ms: additional cost of each fork.
        forking_ms: additional cost of a step with forks, however many.

    """
    rates = _rates_by_size(
        *(ranked.drafts.probability, ranked.request, ranked.weights),
        *(ranked.is_fork, ranked.order, ms),
        *(fork_ms, forking_ms),
    )
    return int(np.argmax(rates)), rates


@compiled
def _rates_by_size(
    probability: Floats,
    request: Ints,
    weights: Floats,
    is_fork: Bools,
    order: Ints,
    ms: Floats,
    fork_ms: float,
    forking_ms: float,
) -> Floats:
    """[n + 1] worth per ms of the first 0, 1, ... nodes of an order [n]; nodes are [T]."""
    emitted = weights.sum()
    rates = np.empty(len(order) + 1)
    rates[0] = emitted / ms[0]
    more_ms = 0.0
    for place, node in enumerate(order):
        emitted += probability[node] * weights[request[node]]
        if is_fork[node]:
            more_ms += fork_ms + forking_ms
            forking_ms = 0.0
        rates[place + 1] = emitted / (ms[place + 1] + more_ms)
    return rates


@compiled
def best_rate(
    request: Ints,
    parents: Ints,
    probability: Floats,
    limits: Ints,
    weights: Floats,
    ms: Floats,
) -> float:
    """Return the worth per ms that the best number of some candidates would give, forks for free.

    Args:
        request, parents, probability: [n] of `Candidates`.
        limits: [B] most nodes of each request.
        weights: [B] worth of a token of each request.
        ms: cost of the step by its nodes; more nodes than it tells are not drafted.

    """
    worth = along_paths(parents, probability) * weights[request]
    left = limits.copy()
    emitted = weights.sum()
    best, size = emitted / ms[0], 0
    for node in np.argsort(-worth, kind="mergesort"):
        if left[request[node]] == 0 or size + 1 == len(ms):
            continue
        left[request[node]] -= 1
        size += 1
        emitted += worth[node]
        best = max(best, emitted / ms[size])
    return float(best)


def take(ranked: Ranked, num_nodes: int) -> Drafts:
    """Return the drafts with the ``num_nodes`` most valuable nodes of all requests."""
    drafts = ranked.drafts
    if num_nodes >= len(ranked.order):
        return drafts
    return Drafts(
        *_taken(
            ranked.order[:num_nodes],
            ranked.request,
            len(drafts),
            *(drafts.tokens, drafts.parents, drafts.depths),
            drafts.probability,
            drafts.source,
        )
    )


@compiled
def _taken(
    order: Ints,
    request: Ints,
    num_requests: int,
    tokens: Ints,
    parents: Ints,
    depths: Ints,
    probability: Floats,
    source: Ints,
) -> tuple[Ints, Ints, Ints, Floats, Ints, Ints]:
    """Return the arrays of `Drafts` of the nodes that an order names, of all [T]."""
    is_chosen = np.zeros(len(tokens), np.bool_)
    starts = np.zeros(num_requests + 1, np.int64)
    for node in order:
        is_chosen[node] = True
        starts[request[node] + 1] += 1
    chosen = np.flatnonzero(is_chosen)
    return (
        *(tokens[chosen], parents[chosen], depths[chosen], probability[chosen], source[chosen]),
        np.cumsum(starts),
    )


@compiled
def _ranked(
    ids: Ints,
    parent_ids: Ints,
    request: Ints,
    tokens: Ints,
    depths: Ints,
    probability: Floats,
    source: Ints,
    limits: Ints,
    max_leaves: Ints,
    weights: Floats,
    num_ids: int,
    min_probability: float,
) -> tuple[Ints, Ints, Ints, Floats, Ints, Ints, Ints, Ints, Bools]:
    """Return the arrays of `Drafts` and of `Ranked`, as `rank` does."""
    likely = np.flatnonzero(probability >= min_probability)
    # One sort for both keys: requests are two apart, probabilities less than one.
    keys = 2.0 * request[likely] - probability[likely]
    by_request = likely[np.argsort(keys, kind="mergesort")]
    kept, parents, is_fork, counts = _within_bounds(
        by_request, ids, parent_ids, request, limits, max_leaves, num_ids
    )
    starts = np.zeros(len(counts) + 1, np.int64)
    for row, count in enumerate(counts):
        starts[row + 1] = starts[row] + count
    order = np.argsort(-probability[kept] * weights[request[kept]], kind="mergesort")
    return (
        *(tokens[kept], parents, depths[kept], probability[kept], source[kept], starts),
        *(request[kept], order, is_fork),
    )


@compiled
def _within_bounds(
    order: Ints,
    ids: Ints,
    parent_ids: Ints,
    request: Ints,
    limits: Ints,
    max_leaves: Ints,
    num_ids: int,
) -> tuple[Ints, Ints, Bools, Ints]:
    """Go through nodes in an order and keep those within the limits of their request.

    Args:
        order: [m] of nodes, request by request, parents first.
        ids, parent_ids, request: [n] of the nodes.
        limits, max_leaves: [B] most nodes and leaves.
        num_ids: ids are below this.

    Returns:
        [T] the nodes that are kept, [T] their parents as in `Drafts`, [T] whether each is a fork,
        [B] how many each request has.

    """
    num_requests = len(limits)
    counts, leaves = np.zeros(num_requests, np.int64), np.ones(num_requests, np.int64)
    places = np.zeros(num_ids, np.int64)
    has_child = np.zeros(num_ids + num_requests, np.bool_)
    kept, parents = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    is_fork = np.empty(len(order), np.bool_)
    size = 0
    for node in order:
        row, parent = request[node], parent_ids[node]
        if counts[row] >= limits[row] or (parent >= 0 and places[parent] == 0):
            continue
        above = parent if parent >= 0 else num_ids + row
        if has_child[above]:
            if leaves[row] >= max_leaves[row]:
                continue
            leaves[row] += 1
        counts[row] += 1
        places[ids[node]] = counts[row]
        kept[size] = node
        parents[size] = places[parent] if parent >= 0 else 0
        is_fork[size] = has_child[above]
        has_child[above] = True
        size += 1
    return kept[:size], parents[:size], is_fork[:size], counts
