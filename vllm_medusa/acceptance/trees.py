"""Draft trees made from rank tables (`statistics`).

The probability that a path is right is counted for the path as a whole: over all positions
(`best_paths`), or over those at which steps begin (`step_paths`). The paper (arXiv
2401.10774, section 2.3.3) multiplies the heads' separate accuracies instead, as if the heads were
independent (`product_paths`).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_medusa.acceptance.statistics import RANK_CAP, Ranks, joined
from vllm_medusa.tree.draft_tree import TreePath

#: Paths that `step_paths` tries for each place in the tree.
_NUM_TRIED = 4


def path_probabilities(tables: Sequence[Ranks]) -> dict[TreePath, float]:
    """Return the share of positions at which each path was right as a whole.

    Paths that were never right are left out. A parent is at least as probable as its children.
    """
    table = _PathTable(joined(tables))
    shares = table.count(np.ones(len(table.right))) / max(1, len(table.right))
    return dict(zip(table.paths, shares.tolist(), strict=True))


def rank_probabilities(tables: Sequence[Ranks]) -> NDArray[np.float64]:
    """Return [heads, RANK_CAP]: the share of positions at which each rank of a head was right."""
    ranks = joined(tables)
    hits = [np.bincount(head[head < RANK_CAP], minlength=RANK_CAP) for head in ranks.T]
    return np.array(hits, dtype=np.float64).reshape(-1, RANK_CAP) / max(1, len(ranks))


def best_paths(tables: Sequence[Ranks], num_paths: int) -> list[TreePath]:
    """Return the paths most often right as a whole, the most probable first.

    Every prefix of the list is a tree, and among trees of its size it has the largest expected
    acceptance length, if steps began equally often at all positions. If two paths are equally often
    right, the one with the larger product of its ranks' probabilities comes first.

    Args:
        tables: rank tables.
        num_paths: how many paths to return; fewer if fewer were ever right.

    """
    by_rank = rank_probabilities(tables).tolist()
    probabilities = path_probabilities(tables)
    products: dict[TreePath, float] = {(): 1.0}
    for path in probabilities:  # parents come before their children
        products[path] = products[path[:-1]] * by_rank[len(path) - 1][path[-1]]

    def order(path: TreePath) -> tuple[float, float, int, TreePath]:
        return -probabilities[path], -products[path], len(path), path

    return heapq.nsmallest(num_paths, probabilities, key=order)


def step_paths(tables: Sequence[Ranks], num_paths: int) -> list[TreePath]:
    """Return the paths most often right where steps begin, the most probable first.

    Like `best_paths`, but only the positions at which steps begin count: few in text that is easy
    to guess, where each step goes far, and many in other text. These positions depend on the tree,
    so the tree is grown path by path. Each new path is the most probable one that fits, given the
    density of the steps of the tree so far (`_StepStarts`). A path also moves the later steps, so
    the next most probable paths are tried too. One of them is taken if it saves more steps, by more
    than chance explains (one standard deviation of their numbers).
    """
    table = _PathTable(joined(tables))
    starts = _StepStarts([len(ranks) for ranks in tables], table.num_heads)
    emitted = np.ones(len(table.right), dtype=np.int64)
    is_open = table.parents < 0
    chosen: list[TreePath] = []
    while len(chosen) < min(num_paths, len(table.paths)):
        visits = starts.visits(emitted)
        counts = np.where(is_open, table.count(starts.smoothed(visits)), -1.0)
        order = np.argsort(-counts, kind="stable")[:_NUM_TRIED]
        tried = [order[0], *(path for path in order[1:] if counts[path] > counts[order[0]] / 2)]
        longer = [emitted + (table.right == path).any(axis=1) for path in tried]
        saved = [visits.sum() - starts.visits(after).sum() for after in longer]
        most = int(np.argmax(saved))
        chance = np.sqrt(abs(saved[most]) + abs(saved[0]))
        place = most if saved[most] - saved[0] > chance else 0
        best, emitted = tried[place], longer[place]
        chosen.append(table.paths[best])
        is_open[best] = False
        is_open |= table.parents == best
    return chosen


def product_paths(tables: Sequence[Ranks], num_paths: int) -> list[TreePath]:
    """Return the most probable paths by the paper's method, the most probable first.

    A path's probability is the product of its ranks' probabilities (paper, section 2.3.3).
    Otherwise like `best_paths`.
    """
    by_rank = rank_probabilities(tables)
    places_to_ranks = np.argsort(-by_rank, axis=1, kind="stable")
    sorted_by_rank = np.take_along_axis(by_rank, places_to_ranks, axis=1).tolist()
    order = places_to_ranks.tolist()
    chosen: list[TreePath] = []
    # The frontier: minus the probability, the depth, the places of the ranks in their order,
    # and the parent's probability. A path's next sibling and first child are no more probable.
    frontier: list[tuple[float, int, TreePath, float]] = []

    def offer(places: TreePath, parent: float) -> None:
        depth = len(places)
        if depth <= len(order) and places[-1] < RANK_CAP:
            probability = parent * sorted_by_rank[depth - 1][places[-1]]
            if probability > 0:
                heapq.heappush(frontier, (-probability, depth, places, parent))

    offer((0,), 1.0)
    while frontier and len(chosen) < num_paths:
        negative, _, places, parent = heapq.heappop(frontier)
        chosen.append(tuple(order[depth][place] for depth, place in enumerate(places)))
        offer((*places[:-1], places[-1] + 1), parent)
        offer((*places, 0), -negative)
    return chosen


class _PathTable:
    """All paths that were ever right.

    Attributes:
        right: [positions, heads] index of the path of that depth that is right; -1 for none.
        paths: by index, parents before their children.
        parents: [paths] index of each path's parent; -1 is the root.
        num_heads: of the ranks.

    """

    def __init__(self, ranks: Ranks) -> None:
        self.right: NDArray[np.int64] = np.full(ranks.shape, -1, dtype=np.int64)
        self.num_heads: int = ranks.shape[1]
        self.paths: list[TreePath] = []
        parents: list[int] = []
        # Group the positions by the path they have in common so far, one depth after the other.
        alive = np.arange(len(ranks))
        group = np.full(len(ranks), -1, dtype=np.int64)
        for depth in range(ranks.shape[1]):
            hit = ranks[alive, depth] < RANK_CAP
            alive, group = alive[hit], group[hit]
            keys, group = np.unique(
                (group + 1) * RANK_CAP + ranks[alive, depth], return_inverse=True
            )
            group = group + len(self.paths)
            for parent, rank in zip(
                (keys // RANK_CAP - 1).tolist(), (keys % RANK_CAP).tolist(), strict=True
            ):
                self.paths.append((*(self.paths[parent] if parent >= 0 else ()), rank))
                parents.append(parent)
            self.right[alive, depth] = group
        self.parents = np.array(parents, dtype=np.int64)

    def count(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return [paths]: sum of the weights [positions] of the positions where each is right."""
        places = np.where(self.right < 0, len(self.paths), self.right).ravel()
        each = np.repeat(weights, self.num_heads)
        counts: NDArray[np.float64] = np.bincount(
            places, weights=each, minlength=len(self.paths) + 1
        ).astype(np.float64)
        return counts[:-1]


class _StepStarts:
    """The density of the positions at which steps begin.

    One walk visits few positions, and chance decides which. So walks begin at each of the first
    positions, and their visits are averaged over windows as long as the longest step.
    """

    def __init__(self, lengths: Sequence[int], num_heads: int) -> None:
        sizes = np.array(lengths, dtype=np.int64)
        self._width = max(lengths, default=0)
        self._longest = num_heads + 1
        self._text = np.repeat(np.arange(len(sizes)), sizes)
        self._place = np.arange(len(self._text)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        self._num_texts = len(lengths)
        self._in_window = self._window_sums(np.ones(len(self._text)))

    def visits(self, emitted: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return [positions]: the share of the walks that visit each.

        Args:
            emitted: [positions] tokens that a step emits that begins there.

        """
        stride = np.ones((self._num_texts, self._width), dtype=np.int64)
        stride[self._text, self._place] = emitted
        visits = np.zeros((self._num_texts, self._width + self._longest))
        visits[:, : self._longest] = 1 / self._longest
        texts = np.arange(self._num_texts)
        for place in range(self._width):
            visits[texts, place + stride[:, place]] += visits[:, place]
        found: NDArray[np.float64] = visits[self._text, self._place]
        return found

    def smoothed(self, visits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return [positions]: the mean of the visits over the window around each."""
        return self._window_sums(visits) / self._in_window

    def _window_sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum [positions] over the windows around them, inside the texts."""
        before = self._longest // 2
        behind = self._longest - before
        padded = np.zeros((self._num_texts, before + self._width + behind))
        padded[self._text, before + self._place] = values
        sums: NDArray[np.float64] = np.cumsum(np.pad(padded, ((0, 0), (1, 0))), axis=1)
        windows: NDArray[np.float64] = (
            sums[self._text, self._place + self._longest] - sums[self._text, self._place]
        )
        return windows
