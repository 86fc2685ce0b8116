"""Everything that is known about a step when its inputs are prepared, in one value."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_medusa.tree.fork_step import ForkStep, make_fork_step
from vllm_medusa.tree.rows import NodeRows
from vllm_medusa.tree.step_trees import IntArray, StepTrees
from vllm_medusa.tree.typical import TypicalBounds

#: Most tokens of all kept plans, which limits their memory (about 1 KiB for each token).
_KEPT_TOKENS = 32_768


@dataclass(frozen=True)
class StepPlan:
    """All indices of a step, which depend on its trees and token counts only.

    Attributes:
        rows: the logits' rows.
        forks: the fork paths; None if the step has no forks.
        first_path_lengths: draft nodes on each request's first fork path.

    """

    rows: NodeRows
    forks: ForkStep | None
    first_path_lengths: Sequence[int]


@dataclass(frozen=True)
class Step:
    """One step of B requests.

    Attributes:
        req_ids: the batch's requests.
        outputs: the output tokens of each, so far; the lists that vLLM itself appends to.
        discarded: indices of the requests whose sample will be discarded (chunks of a prompt).
        drafts: draft tokens that each request verifies, with placeholders (-1).
        num_tokens: [B] tokens that each request runs, on the host.
        num_computed: [B] tokens of each request in the KV cache, on the host.
        plan: the step's indices.
        typical: rules of typical acceptance; None if no request has one.

    """

    req_ids: Sequence[str]
    outputs: Sequence[list[int]]
    discarded: frozenset[int]
    drafts: Sequence[list[int]]
    num_tokens: IntArray
    num_computed: IntArray
    plan: StepPlan
    typical: TypicalBounds | None = None

    @property
    def rows(self) -> NodeRows:
        """The logits' rows."""
        return self.plan.rows


class StepPlanner:
    """Makes the plan of a step. Recent ones are kept: static trees need the same again and again.

    Args:
        device: device of the indices.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: OrderedDict[tuple[object, ...], StepPlan] = OrderedDict()
        self._num_kept_tokens = 0

    def plan(
        self,
        num_tokens: IntArray,
        parents: Sequence[Sequence[int]],
        runs_tree: NDArray[np.bool_],
        num_mirrored: IntArray | None,
    ) -> StepPlan:
        """Return the plan of a step.

        Args:
            num_tokens: [B] tokens that each request runs.
            parents: for each request the parents of the draft nodes that it has logits for.
            runs_tree: [B] whether these are real drafts, not placeholders.
            num_mirrored: as in `make_fork_step`; None where trees are chains only.

        """
        has_forks = num_mirrored is not None and runs_tree.any()
        # Only the forks depend on the number of a prompt's tokens.
        key = (
            tuple(map(tuple, parents)),
            (num_tokens.tobytes(), runs_tree.tobytes(), num_mirrored.tobytes())
            if num_mirrored is not None and has_forks
            else None,
        )
        plan = self._kept.get(key)
        if plan is not None:
            self._kept.move_to_end(key)
            return plan
        trees = StepTrees.build(parents)
        forks = None
        if num_mirrored is not None and has_forks:
            forks = make_fork_step(trees, runs_tree, num_tokens, num_mirrored, self._device)
        plan = StepPlan(NodeRows.build(trees, self._device), forks, trees.first_path_lengths())
        self._keep(key, plan)
        return plan

    def _keep(self, key: tuple[object, ...], plan: StepPlan) -> None:
        self._kept[key] = plan
        self._num_kept_tokens += _size(plan)
        while self._num_kept_tokens > _KEPT_TOKENS and len(self._kept) > 1:
            self._num_kept_tokens -= _size(self._kept.popitem(last=False)[1])


def _size(plan: StepPlan) -> int:
    """Size of a plan for `_KEPT_TOKENS`: about its rows and the writes of its forks."""
    rows = plan.rows.ancestors.numel() // 8 + plan.rows.req.numel()
    return rows if plan.forks is None else rows + plan.forks.host.slot_row.numel()
