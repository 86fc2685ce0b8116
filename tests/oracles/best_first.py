"""Best-first trees, slowly and obviously: take the likeliest node that may be taken, N times."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

RankPath = tuple[int, ...]
#: The paths that may be chosen, parents before children, each with the table of its last guess.
Tables = Mapping[RankPath, int]


def by_head(paths: Sequence[RankPath]) -> Tables:
    """The tables of Medusa heads, one for each."""
    return {path: len(path) - 1 for path in paths}


def by_parent(paths: Sequence[RankPath]) -> Tables:
    """A table for each path that has children, by depth, then by rank."""
    parents = sorted({path[:-1] for path in paths}, key=lambda path: (len(path), path))
    return {path: parents.index(path[:-1]) for path in paths}


def grow(paths: Tables, log_probs: np.ndarray, num_nodes: int) -> list[tuple[RankPath, float]]:
    """Return the chosen rank paths in their order, each with its log-probability.

    Args:
        paths: that may be chosen.
        log_probs: [T, k] float32 of one request's guesses.
        num_nodes: how many to choose, if there are so many.

    """
    order = list(paths)
    place = {path: i for i, path in enumerate(paths)}
    children: Mapping[RankPath, list[RankPath]] = {path: [] for path in [(), *paths]}
    for path in paths:
        children[path[:-1]].append(path)
    frontier: list[tuple[float, int]] = []
    score = {(): np.float32(0)}

    def open_up(path: RankPath) -> None:
        for child in children[path]:
            step = min(log_probs[paths[child], child[-1]], np.float32(0))
            score[child] = score[path] + step
            heapq.heappush(frontier, (-float(score[child]), place[child]))

    open_up(())
    chosen: list[tuple[RankPath, float]] = []
    while frontier and len(chosen) < num_nodes:
        _, index = heapq.heappop(frontier)
        path = order[index]
        chosen.append((path, float(score[path])))
        open_up(path)
    return chosen


def as_nodes(
    chosen: Sequence[RankPath], paths: Tables, guesses: np.ndarray, num_nodes: int
) -> tuple[list[int], list[int]]:
    """Parents (the root's first) and tokens of the nodes; [T, k] guesses of the request."""
    node = {path: i for i, path in enumerate([(), *chosen])}
    parents = [0, *(node[path[:-1]] for path in chosen)]
    tokens = [int(guesses[paths[path], path[-1]]) for path in chosen]
    missing = num_nodes - len(chosen)
    return parents + [-1] * missing, tokens + [0] * missing
