"""Times of the stages of a step: heads, forks, attention, sampling, commit."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_medusa.engines.engine import start_engine
from vllm_medusa.reporting.progress import Progress
from vllm_medusa.reporting.tables import Table
from vllm_medusa.stepcost.measure import MAX_TOKENS, cut_prompts, with_tree
from vllm_medusa.tree.draft_tree import DraftTree, TreePath

TIMERS = {"VLLM_MEDUSA_TIMERS": "1"}
#: Stages of `plugin.worker.timers` that are part of another stage, and that stage; a part of a part
#: comes after it.
_PARTS = {
    "plan": "prepare",
    "attention": "forward",
    "write": "forward",
    "heads": "draft",
    "selector": "heads",
}
#: Headings of the stages, in the order of a step. A stage's time is without its parts.
STAGES = {
    "prepare": "inputs",
    "plan": "fork plan",
    "forward": "model",
    "attention": "attention",
    "write": "K/V writes",
    "sample": "sampling",
    "commit": "commit",
    "prefix": "prefix kept",
    "heads": "heads",
    "selector": "selector",
    "draft": "trees",
}


@dataclass(frozen=True)
class StageTimes:
    """Stage times of the steps of one tree at one batch size.

    Attributes:
        batch_size: requests that decode.
        num_drafts, num_leaves: of the tree.
        step_ms: median time of a step.
        stage_ms: median time in each of `STAGES`.

    """

    batch_size: int
    num_drafts: int
    num_leaves: int
    step_ms: float
    stage_ms: dict[str, float]

    @property
    def rest_ms(self) -> float:
        """The rest: vLLM's scheduler, its bookkeeping, the host's time between stages."""
        return self.step_ms - sum(self.stage_ms.values())


def measure_stages(
    options: Mapping[str, Any],
    heads: Mapping[str, Any],
    trees: Sequence[tuple[TreePath, ...]],
    token_ids: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    environment: Mapping[str, str] | None = None,
    progress: Progress = lambda _: None,
) -> list[StageTimes]:
    """Time the stages of every tree's steps at every batch size, one engine after another.

    The arguments are those of `measure.measure_step_costs`. No speculation has none of our stages
    and is left out. ``progress`` counts runs, two for each tree and batch size.
    """
    result = []
    for tree in filter(None, trees):
        given = with_tree(options, heads, tree, max(batch_sizes))
        with start_engine(given, {**(environment or {}), **TIMERS}) as engine:
            for batch_size in sorted(set(batch_sizes)):
                prompts = cut_prompts(token_ids, batch_size)
                for _ in range(2):  # the first one warms up
                    run = engine.run(prompts, MAX_TOKENS, ignore_eos=True)
                    progress(1)
                begin, end = run.full_steps
                steps = [_exclusive(step) for step in run.stage_ms[begin:end]]
                result.append(
                    StageTimes(
                        batch_size,
                        len(tree),
                        len(DraftTree.from_paths(tree).leaves),
                        statistics.median(run.decode_step_ms),
                        {s: statistics.median(step[s] for step in steps) for s in STAGES},
                    )
                )
    return result


def stage_table(times: Sequence[StageTimes]) -> Table:
    """Return the times as a table."""
    table = Table(
        "Time of the stages of a step, in ms (medians)",
        ("draft nodes", "leaf paths", "batch", "step", *STAGES.values(), "rest"),
        texts=(),
    )
    for row in times:
        cells = [row.step_ms, *(row.stage_ms[stage] for stage in STAGES), row.rest_ms]
        labels = (row.num_drafts, row.num_leaves, row.batch_size)
        table.add(*labels, *(f"{cell:.2f}" for cell in cells))
    return table


def _exclusive(step: Mapping[str, float]) -> dict[str, float]:
    """The time of each stage without its parts."""
    times = {stage: step.get(stage, 0.0) for stage in STAGES}
    for part, whole in _PARTS.items():
        times[whole] -= times[part]
    return times
