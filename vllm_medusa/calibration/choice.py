"""Chooses the fastest tree of each batch size, from acceptance length and step cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_medusa.stepcost.costs import StepCosts
from vllm_medusa.tree.draft_tree import TreePath
from vllm_medusa.tree.schedule import TreeSchedule

#: A larger tree is taken only if each node that it adds raises the speed by this share or more:
#: smaller differences cannot be measured, and the smaller tree needs less of the KV cache.
_MIN_GAIN_PER_NODE = 2e-4


@dataclass(frozen=True)
class Candidate:
    """A tree that can be chosen.

    Attributes:
        name: name in tables.
        paths: paths of the tree; none for no speculation.
        tokens_per_step: its predicted acceptance length.

    """

    name: str
    paths: tuple[TreePath, ...]
    tokens_per_step: float


@dataclass(frozen=True)
class Prediction:
    """The predicted speed of a candidate at a batch size.

    Attributes:
        speedup: tokens per second over those without speculation.
        low, high: the same at the quartiles of the step's cost.
        tokens_per_second: of the whole batch.

    """

    speedup: float
    low: float
    high: float
    tokens_per_second: float


@dataclass(frozen=True)
class Choice:
    """The predictions of all candidates, and the ones chosen.

    Attributes:
        candidates: no speculation first.
        predictions: by batch size, then by candidate.
        chosen: index of the chosen candidate by batch size.

    """

    candidates: tuple[Candidate, ...]
    predictions: dict[int, list[Prediction]]
    chosen: dict[int, int]

    def schedule(self) -> TreeSchedule | None:
        """Return the tree schedule, or None if no drafts are best at every batch size.

        A batch size between two measured ones gets the tree of the larger one, and batch sizes
        beyond the last measured one get its tree.
        """
        entries: list[tuple[int | None, tuple[TreePath, ...]]] = []
        for batch_size, index in sorted(self.chosen.items()):
            paths = self.candidates[index].paths
            if entries and entries[-1][1] == paths:
                entries.pop()
            entries.append((batch_size, paths))
        entries[-1] = (None, entries[-1][1])
        return TreeSchedule.from_entries(entries) if entries[0][1] else None


def choose(candidates: Sequence[Candidate], costs: StepCosts) -> Choice:
    """Choose for each batch size the tree with the most predicted tokens per second.

    The tree of a larger batch is part of the tree of a smaller one, as a schedule requires. Among
    these choices, the one with the largest sum of logarithms of the speed-ups is taken.

    Args:
        candidates: candidates to choose from, no speculation first.
        costs: measured step costs.

    """
    predictions = {
        batch_size: [_predict(candidate, costs, batch_size) for candidate in candidates]
        for batch_size in costs.batch_sizes
    }
    node_sets = [frozenset(candidate.paths) for candidate in candidates]
    # For every candidate at the batch size before: the best sum, and the choices that lead to it.
    best: list[tuple[float, list[int]]] = [(0.0, [])]
    allowed = [[0] for _ in candidates]
    for batch_size in costs.batch_sizes:
        scores = [
            math.log(prediction.speedup) - _MIN_GAIN_PER_NODE * len(nodes)
            for prediction, nodes in zip(predictions[batch_size], node_sets, strict=True)
        ]
        best = [
            (total + score, [*chosen, index])
            for index, score in enumerate(scores)
            for total, chosen in [max((best[i] for i in allowed[index]), key=lambda b: b[0])]
        ]
        allowed = [
            [i for i, larger in enumerate(node_sets) if larger >= nodes] for nodes in node_sets
        ]
    _, chosen = max(best, key=lambda entry: entry[0])
    return Choice(tuple(candidates), predictions, dict(zip(costs.batch_sizes, chosen, strict=True)))


def _predict(candidate: Candidate, costs: StepCosts, batch_size: int) -> Prediction:
    relative = costs.relative(batch_size, candidate.paths)
    length = candidate.tokens_per_step
    step_s = costs.baseline_ms(batch_size) * relative.value / 1000
    return Prediction(
        speedup=length / relative.value,
        low=length / relative.high,
        high=length / relative.low,
        tokens_per_second=batch_size * length / step_s,
    )
