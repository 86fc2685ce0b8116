"""Which of all requests' nodes are drafted: those that pay.

A step emits one token per request and, in expectation, as many more as the sum of the drafted
nodes' path probabilities. So of all nodes the b likeliest are drafted, where b maximises
(requests + that sum) / cost of the step. Path probability falls along a path, so the b likeliest of
all are trees by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_medusa.draft.costs import CostCurve
from vllm_medusa.draft.merge import Nodes
from vllm_medusa.draft.types import Bools, Drafts, Floats, Ints

#: No limit of leaves.
UNLIMITED = 2**31


@dataclass(frozen=True)
class Ranked:
    """The nodes that may be drafted, request by request, the likeliest of each first.

    Attributes:
        drafts: all of them.
        request: [T] request of each node.
        order: [T] the nodes in falling probability, over all requests.
        is_fork: [T] whether another child of its parent is likelier: the node then begins a path
            of its own, beyond its request's first.

    """

    drafts: Drafts
    request: Ints
    order: Ints
    is_fork: Bools


def rank(
    nodes: Nodes, limits: Ints, *, max_leaves: int = UNLIMITED, min_probability: float = 0.0
) -> Ranked:
    """Put the nodes that may be drafted in order.

    Args:
        nodes: of B requests.
        limits: [B] most nodes of each request.
        max_leaves: most leaves of a request's tree. The likeliest forks are kept, and of the
            others neither they nor what is below them.
        min_probability: nodes that are less likely are left out.

    """
    num_requests = len(limits)
    likely = np.flatnonzero(nodes.probability >= min_probability)
    # One sort for both keys: requests are two apart, probabilities less than one.
    order = likely[
        np.argsort(2.0 * nodes.request[likely] - nodes.probability[likely], kind="stable")
    ]
    request, parents = nodes.request[order], _local_parents(nodes, order)
    is_fork = _is_fork(request, parents, num_requests)
    if max_leaves < UNLIMITED:
        kept = _within_leaves(request, parents, is_fork, num_requests, max_leaves)
        order, request, is_fork = order[kept], request[kept], is_fork[kept]
    starts = np.searchsorted(request, np.arange(num_requests + 1))
    kept = np.flatnonzero(np.arange(len(order)) - starts[request] < limits[request])
    order, request, is_fork = order[kept], request[kept], is_fork[kept]
    starts = np.searchsorted(request, np.arange(num_requests + 1))
    parents = _local_parents(nodes, order)
    probability = nodes.probability[order]
    drafts = Drafts(
        tokens=nodes.tokens[order],
        parents=np.where(parents < 0, 0, parents + 1 - starts[request]),
        depths=nodes.depths[order],
        probability=probability,
        source=nodes.source[order],
        starts=starts,
    )
    return Ranked(drafts, request, np.argsort(-probability, kind="stable"), is_fork)


def best_size(
    ranked: Ranked, num_requests: int, costs: CostCurve, more_ms: float = 0.0
) -> tuple[int, Floats]:
    """Return the number of nodes that pays best, and [T + 1] tokens per ms by number of nodes.

    Every number is tried with the forks that it has, so a costly fork makes the numbers behind it
    worse until what hangs below it has made up for it.

    Args:
        ranked: the nodes.
        num_requests: that decode in the step.
        costs: of the step.
        more_ms: what the step costs in any case, beyond that.

    """
    rates = _rates(ranked, ranked.order, num_requests, costs, more_ms)
    return int(np.argmax(rates)), rates


def best_rate(ranked: Ranked, allowed: Bools, num_requests: int, costs: CostCurve) -> float:
    """Return the tokens per ms that the best number of some nodes gives.

    Args:
        ranked: the nodes.
        allowed: [T] which of them count, in falling probability.
        num_requests: that decode in the step.
        costs: of the step.

    """
    return float(_rates(ranked, ranked.order[allowed], num_requests, costs, 0.0).max())


def _rates(
    ranked: Ranked, order: Ints, num_requests: int, costs: CostCurve, more_ms: float
) -> Floats:
    emitted = np.full(len(order) + 1, float(num_requests))
    emitted[1:] += np.cumsum(ranked.drafts.probability[order])
    ms = costs.by_drafts(num_requests, len(order)) + more_ms
    if costs.fork_ms:
        ms[1:] += costs.fork_ms * np.cumsum(ranked.is_fork[order])
    rates: Floats = emitted / ms
    return rates


def take(ranked: Ranked, num_nodes: int) -> Drafts:
    """Return the drafts that hold the ``num_nodes`` likeliest nodes of all requests."""
    drafts = ranked.drafts
    if num_nodes >= len(ranked.order):
        return drafts
    chosen = np.sort(ranked.order[:num_nodes])
    counts = np.bincount(ranked.request[chosen], minlength=len(drafts))
    return Drafts(
        drafts.tokens[chosen],
        drafts.parents[chosen],
        drafts.depths[chosen],
        drafts.probability[chosen],
        drafts.source[chosen],
        np.concatenate([[0], np.cumsum(counts)]),
    )


def _local_parents(nodes: Nodes, order: Ints) -> Ints:
    """Place of each node's parent in ``order``; -1 is the root."""
    places = np.empty(nodes.num_ids + 1, dtype=np.int64)
    places[nodes.ids[order]] = np.arange(len(order))
    places[-1] = -1
    return places[nodes.parents[order]]


def _is_fork(request: Ints, parents: Ints, num_requests: int) -> Bools:
    """[T] whether an earlier node has the same parent."""
    places = np.arange(len(parents))
    parent = np.where(parents < 0, len(parents) + request, parents)
    first = np.empty(len(parents) + num_requests, dtype=np.int64)
    # Of repeated indices the last assignment stands.
    first[parent[::-1]] = places[::-1]
    is_fork: Bools = first[parent] != places
    return is_fork


def _within_leaves(
    request: Ints, parents: Ints, is_fork: Bools, num_requests: int, max_leaves: int
) -> Ints:
    """Places of the nodes of the first path and the first ``max_leaves - 1`` forks."""
    forks = np.cumsum(is_fork)
    starts = np.searchsorted(request, np.arange(num_requests + 1))
    before = np.concatenate([[0], forks])[starts[:-1]]
    keep = ~is_fork | (forks - before[request] < max_leaves)
    # What hangs below a dropped node goes with it; each turn looks twice as far up.
    keep, above = np.append(keep, True), np.append(parents, -1)
    while (above >= 0).any():
        keep &= keep[above]
        above = above[above]
    return np.flatnonzero(keep[:-1])
