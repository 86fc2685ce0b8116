"""The online comparison from plan to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_medusa.bench.display import START, Display, started_line, with_starts
from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.online import Load, OnlineMeasurement, run_online
from vllm_medusa.bench.online_report import (
    measurement_to_json,
    online_figures_of,
    online_table,
    plot_online,
)
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.process import EngineInfo
from vllm_medusa.bench.report import absence_table, depth_table, markdown
from vllm_medusa.bench.results import (
    LINES,
    LineWriter,
    to_json,
    variant_to_json,
    write_results,
)
from vllm_medusa.bench.tables import Table, as_text


class _Watcher:
    """Shows the turns of an online comparison and writes their lines."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._states: Mapping[str, VariantState] = {}
        self._lines: LineWriter | None = None
        self._measurements: list[OnlineMeasurement] = []
        self.display = Display(self._table)

    def _table(self) -> Table:
        return online_table(online_figures_of(self._measurements), self._states)

    def expect(
        self,
        turns: Sequence[tuple[str, Load]],
        states: Mapping[str, VariantState],
        kept_all: bool,
    ) -> None:
        """See `online.OnlineWatcher`."""
        self._states = states
        self._lines = LineWriter(
            self._plan.settings.out / LINES,
            {
                "provenance": self._plan.provenance_json(states),
                "settings": self._plan.settings_json(),
            },
        )
        self.display.expect(with_starts([(name, str(load)) for name, load in turns], kept_all))

    def turn_of(self, variant: str) -> None:
        """See `online.OnlineWatcher`."""
        self.display.begin(variant)

    def started(self, variant: str, info: EngineInfo) -> None:
        """See `online.OnlineWatcher`."""
        self.display.done((variant, START), info.startup_s, started_line(variant, info))

    def measured(self, measurement: OnlineMeasurement) -> None:
        """See `online.OnlineWatcher`."""
        self._measurements.append(measurement)
        if self._lines:
            self._lines.add(measurement_to_json(measurement))
        result = measurement.result
        self.display.done(
            (measurement.variant, str(measurement.load)),
            result["duration"],
            f"round {measurement.round}, {measurement.load}, {measurement.variant}: "
            f"{result['output_throughput']:.1f} tokens/s, {result['median_tpot_ms']:.1f} ms/token",
        )

    def dropped(self, variant: str, reason: str) -> None:
        """See `online.OnlineWatcher`."""
        self.display.drop(variant, reason)


def compare_online(plan: Plan, folder: Path) -> str:
    """Compare servers, write the results, return what to print.

    Args:
        plan: of the comparison.
        folder: for files of the load generator.

    Raises:
        BenchError: something is missing.
        EngineProcessError: the baseline does not run.
    """
    watcher = _Watcher(plan)
    out = plan.settings.out
    with watcher.display:
        result = run_online(
            plan.settings,
            plan.variants,
            plan.prompts,
            plan.options,
            plan.environment,
            plan.unavailable,
            watcher,
            folder,
        )
    figures = online_figures_of(result.measurements)
    notes = [
        *plan.prompts.notes,
        "All servers were alive at once; one was driven at a time."
        if result.kept_all
        else "One server was alive at a time and started again for every round.",
        "Outputs are compared by the offline mode.",
    ]
    tables = [
        online_table(figures, result.states),
        absence_table(result.states),
        depth_table([(f.variant, f.load, f.acceptance_by_depth) for f in figures]),
    ]
    tables = [table for table in tables if table.rows]
    provenance = plan.provenance_json(result.states)
    write_results(
        out,
        {
            "mode": "online",
            "provenance": provenance,
            "settings": plan.settings_json(),
            "variants": [variant_to_json(v, result.states[v.name]) for v in plan.variants],
            "figures": to_json(figures),
            "notes": notes,
        },
    )
    plots = plot_online(out, figures)
    text = markdown(tables, notes, plots, provenance, plan.settings_json())
    (out / "report.md").write_text(text, encoding="utf-8")
    return "\n".join([as_text(tables), *notes, f"written to {out}"])
