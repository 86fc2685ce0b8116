"""Expected acceptance length of trees on prompts that they were not made from.

A tree that is scored on the texts that it was made from looks better than it is. So prompts are
divided into folds. Each fold is scored with the trees of the other folds, and the steps of all
folds are added. The report calls this the prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_medusa.acceptance.intervals import Estimate, by_prompt, difference, ratio, resample
from vllm_medusa.acceptance.ranks import Continuation
from vllm_medusa.acceptance.statistics import Ranks, position_average, simulate, step_counts
from vllm_medusa.acceptance.trees import product_paths, step_paths
from vllm_medusa.tree.draft_tree import DraftTree, TreePath

NUM_FOLDS = 5

FindPaths = Callable[[Sequence[Ranks], int], list[TreePath]]
METHODS: dict[str, FindPaths] = {"joint": step_paths, "product": product_paths}


@dataclass(frozen=True)
class SizeEstimate:
    """Acceptance length, in tokens per step, of one method's tree of one size.

    Attributes:
        size: draft nodes.
        in_sample: simulated on the texts that the tree was made from.
        position_average: in sample, if steps began equally often at all positions (`statistics`).
        predicted: simulated, cross-fitted.

    """

    size: int
    in_sample: float
    position_average: float
    predicted: Estimate


@dataclass(frozen=True)
class Curve:
    """Acceptance length by size.

    Attributes:
        methods: by name of `METHODS`, in the order of the sizes.
        gain: predicted joint minus product at each size.
        chains: figures of the top-1 chains of 1, 2, ... drafts; nothing is fitted for them.
        num_positions, num_continuations: positions, and the continuations that they are from.

    """

    methods: dict[str, list[SizeEstimate]]
    gain: list[Estimate]
    chains: list[Estimate]
    num_positions: int
    num_continuations: int


class CrossFit:
    """Trees made from all prompts, and for each fold from the other folds.

    Args:
        continuations: the measured ones.
        max_size: nodes of the largest tree.
        seed: of the folds and the resamples.

    Attributes:
        paths: each method's most probable paths by all continuations.
        folds: [continuations] the fold of each.

    """

    def __init__(self, continuations: Sequence[Continuation], max_size: int, seed: int) -> None:
        self._continuations = continuations
        self._prompt_ids = [item.prompt_id for item in continuations]
        self.folds = deal(self._prompt_ids, seed)
        self._resamples = resample(len(set(self._prompt_ids)), seed)
        everything = [item.ranks for item in continuations]
        self.paths = {name: find(everything, max_size) for name, find in METHODS.items()}
        self._fold_paths = {
            name: [find(self._ranks_outside(fold), max_size) for fold in range(NUM_FOLDS)]
            for name, find in METHODS.items()
        }

    def curve(self, sizes: Sequence[int], chosen: Sequence[bool], with_loops: bool) -> Curve:
        """Estimate every size.

        Args:
            sizes: draft nodes.
            chosen: continuations to score; the trees are made from all of them.
            with_loops: whether to score looping text as well.

        """
        scored = [
            item.ranks_of(with_loops=with_loops) if is_chosen else item.ranks[:0]
            for item, is_chosen in zip(self._continuations, chosen, strict=True)
        ]
        counts = {
            name: [self._fold_counts(scored, name, size) for size in sizes] for name in METHODS
        }
        num_heads = scored[0].shape[1]
        return Curve(
            methods={
                name: [
                    SizeEstimate(
                        size,
                        simulate(scored, self.paths[name][:size]),
                        position_average(scored, self.paths[name][:size]),
                        self._ratio(count),
                    )
                    for size, count in zip(sizes, counts[name], strict=True)
                ]
                for name in METHODS
            },
            gain=[
                self._difference(joint, product)
                for joint, product in zip(counts["joint"], counts["product"], strict=True)
            ],
            chains=[
                self._ratio(step_counts(scored, DraftTree.chain(length).paths))
                for length in range(1, num_heads + 1)
            ],
            num_positions=sum(map(len, scored)),
            num_continuations=sum(map(bool, chosen)),
        )

    def _ranks_outside(self, fold: int) -> list[Ranks]:
        items = zip(self._continuations, self.folds.tolist(), strict=True)
        return [item.ranks for item, own in items if own != fold]

    def _fold_counts(self, scored: list[Ranks], method: str, size: int) -> NDArray[np.int64]:
        """`step_counts`, each continuation with the tree of the other folds."""
        counts = np.zeros((len(scored), 2), dtype=np.int64)
        for fold, paths in enumerate(self._fold_paths[method]):
            inside = np.flatnonzero(self.folds == fold)
            counts[inside] = step_counts([scored[i] for i in inside], paths[:size])
        return counts

    def _ratio(self, counts: NDArray[np.int64]) -> Estimate:
        return ratio(by_prompt(counts, self._prompt_ids), self._resamples)

    def _difference(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> Estimate:
        return difference(
            by_prompt(first, self._prompt_ids),
            by_prompt(second, self._prompt_ids),
            self._resamples,
        )


def deal(prompt_ids: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Return the fold of each text; texts of one prompt are in one fold."""
    prompts, place = np.unique(prompt_ids, return_inverse=True)
    rng = np.random.default_rng(seed)
    folds: NDArray[np.int64] = rng.permutation(np.arange(len(prompts)) % NUM_FOLDS)[place]
    return folds
