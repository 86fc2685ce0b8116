"""The report of a comparison: its tables, and all of it as Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_medusa.bench.categories import CategoryFigures
from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.figures import Column, Figures, Kind, load_name
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.results import FORMAT, REPORT, RESULTS, variant_to_json
from vllm_medusa.bench.sameness import Mismatch, Sameness
from vllm_medusa.bench.spread import Spread
from vllm_medusa.files import write_bytes, write_json
from vllm_medusa.reporting.tables import Table, as_text

#: Mismatches shown one by one, of each variant.
_SHOWN_MISMATCHES = 5


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The additions of a mode to the report.

    Attributes:
        tables: also those without rows.
        results: for the JSON document.
        notes: sentences.
        complaint: error message of ``--strict``; None: no error.
    """

    tables: Sequence[Table] = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    complaint: str | None = None


def speed_table(
    figures: Sequence[Figures], states: Mapping[str, VariantState], kind: Kind
) -> Table:
    """Every figure by load and variant."""
    headings = [column.heading for column in kind.columns] + [text for _, text in kind.totals]
    columns = ("variant", kind.load[1], *headings, "memory GiB", "start-up s")
    table = Table(kind.title, columns, texts=("variant", "load"))
    for row in figures:
        starts = [info.startup_s for info in states[row.variant].starts]
        table.add(
            row.variant,
            row.load,
            *(_cell(row.spreads[column.name], column) for column in kind.columns),
            *(row.totals[name] for name, _ in kind.totals),
            _memory(row),
            f"{statistics.median_high(starts):.1f}" if starts else "",
        )
    return table


def absence_table(states: Mapping[str, VariantState]) -> Table:
    """The variants that did not run, or not completely, and why."""
    table = Table("Not measured, or not completely", ("variant", "", "reason"))
    table.texts = table.columns
    for name, state in states.items():
        if state.reason is not None:
            what = "unavailable" if state.unavailable else "broke off"
            table.add(name, what, state.reason)
    return table


def depth_table(figures: Sequence[Figures]) -> Table:
    """Share of drafts accepted at each depth."""
    depth = max((len(row.acceptance_by_depth) for row in figures), default=0)
    table = Table(
        "Acceptance by depth: share of steps with drafts that accepted a draft token at this depth",
        ("variant", "load", *(str(number) for number in range(1, depth + 1))),
        texts=("variant", "load"),
    )
    for row in figures:
        if cells := [f"{share:.2f}" for share in row.acceptance_by_depth]:
            padding = [""] * (depth - len(cells))
            table.add(row.variant, load_name(row.load), *cells, *padding)
    return table


def category_table(categories: Sequence[CategoryFigures]) -> Table:
    """Every figure by category, all batch sizes together."""
    table = Table(
        "By category, all batch sizes: the baseline's time per output token over the variant's",
        ("category", "variant", "requests", "over baseline", "tokens/step"),
        texts=("category", "variant"),
    )
    for figure in sorted(categories, key=lambda figure: figure.category):
        table.add(
            figure.category,
            figure.variant,
            figure.num_requests,
            figure.speedup and figure.speedup.format(2),
            figure.tokens_per_step and figure.tokens_per_step.format(2),
        )
    return table


def sameness_table(sameness: Sequence[Sameness], dtype: str) -> Table:
    """Number of outputs that equal the baseline's, token for token."""
    table = Table(
        "Sameness: greedy outputs compared with the baseline's, token for token",
        ("variant", "outputs", "same", "near-ties", "other mismatches"),
    )
    for found in sameness:
        compared, different = found.num_compared, len(found.mismatches)
        ties = found.num_near_ties(dtype)
        table.add(found.variant, compared, compared - different, ties, different - ties)
    return table


def mismatch_table(sameness: Sequence[Sameness], dtype: str) -> Table:
    """The first mismatches of each variant, one by one."""
    table = Table(
        f"Mismatches (the first {_SHOWN_MISMATCHES} of each variant; all are in results.json)",
        (
            *("variant", "batch", "round", "prompt", "position"),
            *("baseline's token", "variant's token", "their logprobs", ""),
        ),
        texts=("variant", "prompt", ""),
    )
    for found in sameness:
        for mismatch in found.mismatches[:_SHOWN_MISMATCHES]:
            logprobs = (mismatch.baseline_logprob, mismatch.variant_logprob)
            table.add(
                *(mismatch.variant, mismatch.batch_size, mismatch.round, mismatch.prompt_id),
                mismatch.position,
                _token(mismatch.baseline_token),
                _token(mismatch.variant_token),
                " ".join("" if value is None else f"{value:.4f}" for value in logprobs),
                _verdict(mismatch, dtype),
            )
    return table


def write_report(
    plan: Plan,
    states: Mapping[str, VariantState],
    tables: Sequence[Table],
    notes: Sequence[str],
    plots: Sequence[tuple[str, str]],
    results: Mapping[str, Any],
) -> str:
    """Write results.json and report.md; return the tables and notes as text.

    Args:
        plan: of the comparison.
        states: by variant.
        tables: in order; those without rows are left out.
        notes: sentences.
        plots: file name and caption of each.
        results: the rest of the JSON, beside provenance, settings, variants and notes.
    """
    out, settings = plan.settings.out, plan.settings_json()
    provenance = plan.provenance_json(states)
    filled = [table for table in tables if table.rows]
    common = {
        "provenance": provenance,
        "settings": settings,
        "variants": [variant_to_json(v, states[v.name]) for v in plan.variants],
        "notes": list(notes),
    }
    write_json(out / RESULTS, {"format": FORMAT, **common, **results})
    text = markdown(filled, notes, plots, provenance, settings)
    write_bytes(out / REPORT, text.encode())
    return "\n".join([as_text(filled), *notes, f"written to {out}"])


def markdown(
    tables: Sequence[Table],
    notes: Sequence[str],
    plots: Sequence[tuple[str, str]],
    provenance: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> str:
    """The whole report as Markdown.

    Args:
        tables: in order.
        notes: sentences.
        plots: file name and caption of each.
        provenance: as `provenance.provenance` gives it.
        settings: as `Settings.to_json` gives them.
    """
    machine, versions = provenance["machine"], provenance["versions"]
    device = machine["device"] or ", ".join(machine["cpu_flags"]) or "no vector instructions"
    parts = [
        f"# vllm-medusa bench: {settings['model']}",
        f"```\n{provenance['command']}\n```",
        f"{provenance['time']}; {machine['cpu']}, {machine['cores']} cores ({device}); vLLM "
        f"{versions['vllm']}, torch {versions['torch']}, vllm_medusa {versions['vllm_medusa']} "
        f"(revision {provenance['git_revision']}). Ratios are taken within a round; a figure is a "
        "median, in brackets its first and third quartile.",
        *(f"- {note}" for note in notes),
        *(f"## {table.title}\n\n{table.markdown()}" for table in tables),
        *(f"## {caption}\n\n![{caption}]({name})" for name, caption in plots),
        f"## Settings\n\n```json\n{json.dumps(settings, indent=1)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _cell(figure: Spread | None, column: Column) -> str:
    if figure is None:
        return ""
    if column.has_spread:
        return figure.format(column.digits)
    return f"{figure.median:.{column.digits}f}"


def _memory(row: Figures) -> str:
    on_device = row.peaks.get("device_memory_bytes")
    text = f"{(row.peaks['peak_memory_bytes'] or 0) / 2**30:.2f}"
    return text if on_device is None else f"{text} + {on_device / 2**30:.2f} on the device"


def _verdict(mismatch: Mismatch, dtype: str) -> str:
    if mismatch.gap is None:
        return "unknown"
    return "near-tie" if mismatch.is_near_tie(dtype) else "not a tie"


def _token(token: int | None) -> str:
    return "end" if token is None else str(token)
