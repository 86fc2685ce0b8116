"""What is known of a step when its inputs are prepared: one value for all that takes part in it."""

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

#: Plans are kept for so many tokens of steps, which bounds their memory (about 1 KiB a token).
_KEPT_TOKENS = 32_768


@dataclass(frozen=True)
class StepPlan:
    """All indices of a step, which depend on its trees and token counts only.

    Attributes:
        rows: the logits' rows.
        forks: the fork paths; None if the step runs as vLLM's own.
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
        discarded: indices of those whose sample will be thrown away (chunks of a prompt).
        drafts: draft tokens that each request verifies, placeholders (-1) among them.
        num_computed: [B] tokens of each request in the KV cache, on the host.
        plan: the step's indices.
        typical: rules of typical acceptance; None if no request has one.

    """

    req_ids: Sequence[str]
    outputs: Sequence[list[int]]
    discarded: frozenset[int]
    drafts: Sequence[list[int]]
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
        device: where the indices are needed.

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
            runs_tree: [B] whether these are drafts, not placeholders.
            num_mirrored: as in `make_fork_step`; None where trees are chains only.

        """
        has_forks = num_mirrored is not None and runs_tree.any()
        # A prompt's tokens matter to the forks only.
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
    """Tokens of a plan: its logits' rows, or all that it runs."""
    rows = plan.rows.ancestors.numel() // 8 + plan.rows.req.numel()
    return rows if plan.forks is None else rows + plan.forks.host.slot_req.numel()
