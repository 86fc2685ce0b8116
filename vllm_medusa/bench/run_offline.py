"""The offline comparison from plan to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.figures import categories_of, figures_of
from vllm_medusa.bench.offline import Measurement, OfflineResult, batch_name, run_offline
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.plots import plot_offline
from vllm_medusa.bench.report import Report, speed_table, write_report
from vllm_medusa.bench.results import (
    sameness_to_json,
    to_json,
)
from vllm_medusa.bench.sameness import TIE_LOGPROB
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.watcher import ShowingWatcher
from vllm_medusa.errors import UserError
from vllm_medusa.reporting.tables import Table


def compare_offline(plan: Plan) -> str:
    """Compare engines offline, write the results, return what to print.

    Raises:
        UserError: with ``strict``, outputs that differ.
        EngineProcessError: the baseline does not run.
    """

    def table(measurements: Sequence[Measurement], states: Mapping[str, VariantState]) -> Table:
        return speed_table(figures_of(measurements), states)

    watcher = ShowingWatcher[int, Measurement](plan, table, batch_name)
    settings = plan.settings
    with watcher.display:
        result = run_offline(
            settings,
            plan.variants,
            plan.prompts,
            plan.options,
            plan.environment,
            plan.unavailable,
            watcher,
        )
    figures = figures_of(result.measurements)
    notes = [*plan.prompts.notes, *_notes(plan, result)]
    report = Report(
        figures=figures,
        categories=categories_of(result.measurements),
        sameness=result.sameness,
        states=result.states,
        dtype=tie_dtype(settings),
        notes=notes,
    )
    printed = write_report(
        plan,
        result.states,
        report.tables(),
        notes,
        plot_offline(settings.out, figures),
        {
            "mode": "offline",
            "figures": to_json(figures),
            "categories": to_json(report.categories),
            "sameness": [sameness_to_json(found, report.dtype) for found in result.sameness],
        },
    )
    if settings.strict:
        watcher.display.say(printed)
        check_sameness(result, report.dtype, settings.out)
    return printed


def check_sameness(result: OfflineResult, dtype: str, out: Path) -> None:
    """Fail a strict run.

    Raises:
        UserError: any output of a lossless variant differs from the baseline's.
    """
    different = [found for found in result.sameness if found.mismatches]
    if not different:
        return
    counts = []
    for found in different:
        ties = sum(mismatch.is_near_tie(dtype) for mismatch in found.mismatches)
        counts.append(
            f"{found.variant} {len(found.mismatches)} of {found.num_compared} ({ties} near-ties)"
        )
    raise UserError(
        f"--strict: outputs differ from the baseline's: {', '.join(counts)}; see {out}/report.md"
    )


def _notes(plan: Plan, result: OfflineResult) -> list[str]:
    """What a reader of the figures has to know."""
    notes = [
        "All engines were alive at once and took turns at every batch."
        if result.kept_all
        else "One engine was alive at a time and started again for every round, with a warm-up."
    ]
    names = {m.variant for m in result.measurements if m.run.num_preemptions}
    if names:
        notes.append(
            f"Requests of {', '.join(sorted(names))} were preempted: the KV cache is too small for "
            "these batches, which the times show; give kv_cache_memory_bytes in --llm-options."
        )
    lossy = [v.name for v in plan.variants if not v.is_lossless]
    if lossy:
        notes.append(f"Lossy, so their outputs were not compared: {', '.join(lossy)}.")
    return notes


def tie_dtype(settings: Settings) -> str:
    """The dtype that decides what a near-tie is: float32, the strictest, for ``auto``."""
    return settings.dtype if settings.dtype in TIE_LOGPROB else "float32"
