"""The report of an offline comparison: its tables, and all of it as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.figures import CategoryFigures, Figures
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.results import REPORT, variant_to_json, write_results
from vllm_medusa.bench.sameness import Mismatch, Sameness
from vllm_medusa.bench.spread import Spread
from vllm_medusa.reporting.tables import Table, as_text

#: Mismatches shown one by one, of each variant.
_SHOWN_MISMATCHES = 5


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a report of an offline comparison says.

    Attributes:
        figures: by variant and batch size.
        categories: by variant and category.
        sameness: by variant.
        states: by variant.
        dtype: of the engines, as far as it was given.
        notes: sentences.
    """

    figures: Sequence[Figures]
    categories: Sequence[CategoryFigures]
    sameness: Sequence[Sameness]
    states: Mapping[str, VariantState]
    dtype: str
    notes: Sequence[str]

    def tables(self) -> list[Table]:
        """All tables, also those without rows."""
        return [
            speed_table(self.figures, self.states),
            absence_table(self.states),
            depth_table(
                [(f.variant, f"batch {f.batch_size}", f.acceptance_by_depth) for f in self.figures]
            ),
            category_table(self.categories),
            sameness_table(self.sameness, self.dtype),
            mismatch_table(self.sameness, self.dtype),
        ]


def speed_table(figures: Sequence[Figures], states: Mapping[str, VariantState]) -> Table:
    """Every figure by batch size and variant; variants that did not run say why."""
    table = Table(
        "Speed: median (first to third quartile)",
        (
            "variant",
            "batch",
            "tokens/s",
            "over baseline",
            "tokens/step",
            "steps",
            "step ms",
            "TTFT ms",
            "TPOT ms",
            "memory GiB",
            "start-up s",
        ),
    )
    for figure in figures:
        starts = [info.startup_s for info in states[figure.variant].starts]
        table.rows.append(
            (
                figure.variant,
                str(figure.batch_size),
                f"{figure.tokens_per_s.median:.1f}",
                _format(figure.speedup, 2),
                f"{figure.tokens_per_step.median:.2f}",
                f"{figure.num_steps.median:.0f}",
                figure.step_ms.format(2),
                f"{figure.ttft_ms.median:.1f}",
                _format(figure.tpot_ms, 2),
                _memory(figure),
                f"{sorted(starts)[len(starts) // 2]:.1f}" if starts else "",
            )
        )
    return table


def absence_table(states: Mapping[str, VariantState]) -> Table:
    """The variants that did not run, or not to the end, and why."""
    table = Table("Not measured, or not to the end", ("variant", "", "reason"))
    table.texts = table.columns
    for name, state in states.items():
        if state.reason is not None:
            what = "unavailable" if state.unavailable else "broke off"
            table.rows.append((name, what, state.reason))
    return table


def depth_table(shares: Sequence[tuple[str, str, Sequence[float]]]) -> Table:
    """Share of drafts accepted at least so deep.

    Args:
        shares: of each variant and load, the shares at depth 1, 2, ...; empty without drafts.
    """
    depth = max((len(by_depth) for _, _, by_depth in shares), default=0)
    table = Table(
        "Acceptance by depth: share of steps with drafts whose draft token there was accepted",
        ("variant", "load", *(str(number) for number in range(1, depth + 1))),
        texts=("variant", "load"),
    )
    for variant, load, by_depth in shares:
        if by_depth:
            cells = [f"{share:.2f}" for share in by_depth]
            table.rows.append((variant, load, *cells, *[""] * (depth - len(cells))))
    return table


def category_table(categories: Sequence[CategoryFigures]) -> Table:
    """Every figure by category, all batch sizes together."""
    table = Table(
        "By category, all batch sizes: the baseline's time per output token over the variant's",
        ("category", "variant", "requests", "over baseline", "tokens/step"),
        texts=("category", "variant"),
    )
    for figure in sorted(categories, key=lambda figure: figure.category):
        table.rows.append(
            (
                figure.category,
                figure.variant,
                str(figure.num_requests),
                _format(figure.speedup, 2),
                _format(figure.tokens_per_step, 2),
            )
        )
    return table


def sameness_table(sameness: Sequence[Sameness], dtype: str) -> Table:
    """How many outputs are the baseline's, token for token."""
    table = Table(
        "Sameness: greedy outputs compared with the baseline's, token for token",
        ("variant", "outputs", "same", "near-ties", "other mismatches"),
    )
    for found in sameness:
        ties = sum(mismatch.is_near_tie(dtype) for mismatch in found.mismatches)
        table.rows.append(
            (
                found.variant,
                str(found.num_compared),
                str(found.num_compared - len(found.mismatches)),
                str(ties),
                str(len(found.mismatches) - ties),
            )
        )
    return table


def mismatch_table(sameness: Sequence[Sameness], dtype: str) -> Table:
    """The first mismatches of each variant, one by one."""
    table = Table(
        f"Mismatches (the first {_SHOWN_MISMATCHES} of each variant; all are in results.json)",
        (
            "variant",
            "batch",
            "round",
            "prompt",
            "position",
            "baseline's token",
            "variant's token",
            "their logprobs",
            "",
        ),
        texts=("variant", "prompt", ""),
    )
    for found in sameness:
        for mismatch in found.mismatches[:_SHOWN_MISMATCHES]:
            logprobs = (mismatch.baseline_logprob, mismatch.variant_logprob)
            table.rows.append(
                (
                    mismatch.variant,
                    str(mismatch.batch_size),
                    str(mismatch.round),
                    mismatch.prompt_id,
                    str(mismatch.position),
                    _token(mismatch.baseline_token),
                    _token(mismatch.variant_token),
                    " ".join("" if value is None else f"{value:.4f}" for value in logprobs),
                    _verdict(mismatch, dtype),
                )
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
        results: what the JSON holds beside provenance, settings, variants and notes.
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
    write_results(out, {**common, **results})
    text = markdown(filled, notes, plots, provenance, settings)
    (out / REPORT).write_text(text, encoding="utf-8")
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


def _memory(figure: Figures) -> str:
    text = f"{figure.peak_memory_bytes / 2**30:.2f}"
    if figure.device_memory_bytes is not None:
        text += f" + {figure.device_memory_bytes / 2**30:.2f} on the device"
    return text


def _format(figure: Spread | None, digits: int) -> str:
    return "" if figure is None else figure.format(digits)


def _verdict(mismatch: Mismatch, dtype: str) -> str:
    if mismatch.gap is None:
        return "unknown"
    return "near-tie" if mismatch.is_near_tie(dtype) else "not a tie"


def _token(token: int | None) -> str:
    return "end" if token is None else str(token)
