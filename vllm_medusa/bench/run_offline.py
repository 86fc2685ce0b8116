"""The offline comparison from plan to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_medusa.bench.display import START, Display, started_line, with_starts
from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.errors import BenchError
from vllm_medusa.bench.figures import categories_of, figures_of
from vllm_medusa.bench.offline import Measurement, OfflineResult, run_offline
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.plots import plot_offline
from vllm_medusa.bench.process import EngineInfo
from vllm_medusa.bench.report import Report, markdown, speed_table
from vllm_medusa.bench.results import (
    LINES,
    LineWriter,
    measurement_to_json,
    sameness_to_json,
    to_json,
    variant_to_json,
    write_results,
)
from vllm_medusa.bench.sameness import TIE_LOGPROB
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.tables import Table, as_text


class _Watcher:
    """Shows the turns of an offline comparison and writes their lines."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._states: Mapping[str, VariantState] = {}
        self._lines: LineWriter | None = None
        self._measurements: list[Measurement] = []
        self.display = Display(self._table)

    def _table(self) -> Table:
        return speed_table(figures_of(self._measurements), self._states)

    def expect(
        self,
        turns: Sequence[tuple[str, int]],
        states: Mapping[str, VariantState],
        kept_all: bool,
    ) -> None:
        """See `offline.Watcher`."""
        self._states = states
        self._lines = LineWriter(
            self._plan.settings.out / LINES,
            {
                "provenance": self._plan.provenance_json(states),
                "settings": self._plan.settings_json(),
            },
        )
        batches = [(name, f"batch {size}") for name, size in turns]
        self.display.expect(with_starts(batches, kept_all))

    def turn_of(self, variant: str) -> None:
        """See `offline.Watcher`."""
        self.display.begin(variant)

    def started(self, variant: str, info: EngineInfo) -> None:
        """See `offline.Watcher`."""
        self.display.done((variant, START), info.startup_s, started_line(variant, info))

    def measured(self, measurement: Measurement) -> None:
        """See `offline.Watcher`."""
        self._measurements.append(measurement)
        if self._lines:
            self._lines.add(measurement_to_json(measurement))
        batch = f"batch {measurement.batch_size}"
        self.display.done(
            (measurement.variant, batch),
            measurement.run.seconds,
            f"round {measurement.round}, {batch}, {measurement.variant}: "
            f"{measurement.tokens_per_s:.1f} tokens/s, "
            f"{measurement.run.tokens_per_step:.2f} tokens/step",
        )

    def dropped(self, variant: str, reason: str) -> None:
        """See `offline.Watcher`."""
        self.display.drop(variant, reason)


def compare_offline(plan: Plan) -> str:
    """Compare engines offline, write the results, return what to print.

    Raises:
        BenchError: with ``strict``, outputs that differ.
        EngineProcessError: the baseline does not run.
    """
    watcher = _Watcher(plan)
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
    tables = report.tables()
    write_results(
        settings.out,
        {
            "mode": "offline",
            "provenance": plan.provenance_json(result.states),
            "settings": plan.settings_json(),
            "variants": [variant_to_json(v, result.states[v.name]) for v in plan.variants],
            "figures": to_json(figures),
            "categories": to_json(report.categories),
            "sameness": [sameness_to_json(found, report.dtype) for found in result.sameness],
            "notes": notes,
        },
    )
    plots = plot_offline(settings.out, figures)
    text = markdown(tables, notes, plots, plan.provenance_json(result.states), plan.settings_json())
    (settings.out / "report.md").write_text(text, encoding="utf-8")
    printed = as_text(tables)
    if settings.strict:
        watcher.display.say(printed)
        check_sameness(result, report.dtype, settings.out)
    return "\n".join([printed, *notes, f"written to {settings.out}"])


def check_sameness(result: OfflineResult, dtype: str, out: Path) -> None:
    """Fail a strict run.

    Raises:
        BenchError: any output of a lossless variant differs from the baseline's.
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
    raise BenchError(
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
