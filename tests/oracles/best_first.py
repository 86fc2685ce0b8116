"""Best-first trees, slowly and obviously: take the likeliest node that may be taken, N times."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

RankPath = tuple[int, ...]


def grow(
    paths: Sequence[RankPath], log_probs: np.ndarray, num_nodes: int
) -> list[tuple[RankPath, float]]:
    """Return the chosen rank paths in their order, each with its log-probability.

    Args:
        paths: that may be chosen, parents before children.
        log_probs: [K, k] float32 of one request's guesses.
        num_nodes: how many to choose, if there are so many.

    """
    place = {path: i for i, path in enumerate(paths)}
    children: Mapping[RankPath, list[RankPath]] = {path: [] for path in [(), *paths]}
    for path in paths:
        children[path[:-1]].append(path)
    frontier: list[tuple[float, int]] = []
    score = {(): np.float32(0)}

    def open_up(path: RankPath) -> None:
        for child in children[path]:
            step = min(log_probs[len(child) - 1, child[-1]], np.float32(0))
            score[child] = score[path] + step
            heapq.heappush(frontier, (-float(score[child]), place[child]))

    open_up(())
    chosen: list[tuple[RankPath, float]] = []
    while frontier and len(chosen) < num_nodes:
        _, index = heapq.heappop(frontier)
        path = paths[index]
        chosen.append((path, float(score[path])))
        open_up(path)
    return chosen


def as_nodes(
    chosen: Sequence[RankPath], guesses: np.ndarray, num_nodes: int
) -> tuple[list[int], list[int]]:
    """Parents (the root's first) and tokens of the nodes; [K, k] guesses of the request."""
    node = {path: i for i, path in enumerate([(), *chosen])}
    parents = [0, *(node[path[:-1]] for path in chosen)]
    tokens = [int(guesses[len(path) - 1, path[-1]]) for path in chosen]
    missing = num_nodes - len(chosen)
    return parents + [-1] * missing, tokens + [0] * missing
