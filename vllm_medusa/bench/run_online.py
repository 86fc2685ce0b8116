"""The online comparison from plan to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.online import Load, OnlineMeasurement, run_online
from vllm_medusa.bench.online_report import (
    online_figures_of,
    online_table,
    plot_online,
)
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.report import absence_table, depth_table, write_report
from vllm_medusa.bench.results import (
    to_json,
)
from vllm_medusa.bench.watcher import ShowingWatcher
from vllm_medusa.reporting.tables import Table


def compare_online(plan: Plan, folder: Path) -> str:
    """Compare servers, write the results, return what to print.

    Args:
        plan: of the comparison.
        folder: for files of the load generator.

    Raises:
        UserError: something is missing.
        EngineProcessError: the baseline does not run.
    """

    def table(
        measurements: Sequence[OnlineMeasurement], states: Mapping[str, VariantState]
    ) -> Table:
        return online_table(online_figures_of(measurements), states)

    watcher = ShowingWatcher[Load, OnlineMeasurement](plan, table, str)
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
    return write_report(
        plan,
        result.states,
        tables,
        notes,
        plot_online(out, figures),
        {"mode": "online", "figures": to_json(figures)},
    )
