"""The report of a calibration: JSON with everything, Markdown with tables, and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_medusa.acceptance.intervals import Estimate
from vllm_medusa.acceptance.texts import LOOP_TOKENS
from vllm_medusa.calibration.choice import Choice
from vllm_medusa.calibration.dynamic import DynamicFindings
from vllm_medusa.calibration.estimates import NUM_FOLDS, SizeEstimate
from vllm_medusa.calibration.findings import Findings, Section
from vllm_medusa.calibration.plots import draw_acceptance, draw_reliability, draw_speedup, draw_tree
from vllm_medusa.reporting.tables import Table
from vllm_medusa.settings import as_json
from vllm_medusa.stepcost.costs import StepCost, StepCosts

REPORT_FORMAT = "vllm_medusa.calibration/1"


def write_report(findings: Findings, out: Path) -> None:
    """Write `calibration.json`, `calibration.md` and the pictures."""
    data = json.dumps(to_dict(findings), indent=1)
    (out / "calibration.json").write_text(data + "\n", encoding="utf-8")
    pictures = [draw_acceptance(findings, out), draw_tree(findings, out)]
    pictures.append(draw_reliability(findings.dynamic.reliability, out))
    if findings.choice is not None:
        pictures.append(draw_speedup(findings.choice, out))
    (out / "calibration.md").write_text(markdown(findings, pictures), encoding="utf-8")


def to_dict(findings: Findings) -> dict[str, Any]:
    """Return everything as JSON values."""
    choice = findings.choice
    return {
        "format": REPORT_FORMAT,
        "provenance": findings.provenance,
        "settings": as_json(findings.settings),
        "num_heads": findings.num_heads,
        "num_prompts": findings.num_prompts,
        "num_folds": NUM_FOLDS,
        "loop_tokens": LOOP_TOKENS,
        "sections": [
            {
                "text": section.name,
                "with_loops": section.with_loops,
                "accuracy": {f"top-{n}": list(row) for n, row in section.accuracy.items()},
                **asdict(section.curve),
            }
            for section in findings.sections
        ],
        "paths": {name: [list(p) for p in paths] for name, paths in findings.paths.items()},
        "probabilities": [findings.probabilities[path] for path in findings.paths["joint"]],
        "dynamic": _dynamic_values(findings.dynamic),
        "checked": [
            {
                **asdict(checked),
                "predicted_with_loops": asdict(findings.predicted(checked, True)),
                "predicted_without_loops": asdict(findings.predicted(checked, False)),
            }
            for checked in findings.checked
        ],
        "step_costs": None if findings.costs is None else findings.costs.to_dict(),
        "choice": None
        if choice is None
        else {
            "candidates": [candidate.name for candidate in choice.candidates],
            "batch_sizes": {
                str(batch_size): {
                    "chosen": choice.candidates[index].name,
                    "predictions": [asdict(p) for p in choice.predictions[batch_size]],
                }
                for batch_size, index in choice.chosen.items()
            },
        },
    }


def markdown(findings: Findings, pictures: Sequence[tuple[str, str]]) -> str:
    """Return the report as a page of Markdown.

    Args:
        findings: what was found.
        pictures: file name and caption of each.

    """
    settings = findings.settings
    lines = [
        "# Calibration",
        "",
        f"Heads `{settings.heads}` for `{settings.model}`: {findings.num_prompts} prompts from "
        f"`{settings.prompts}`, {settings.max_tokens} tokens each, {settings.dtype}. Tokens per "
        "step are the accepted draft tokens and one more. *Predicted* figures are cross-fitted: "
        f"each of {NUM_FOLDS} parts of the prompts is scored with trees made from the others; the "
        "brackets are 95 % intervals over prompts. *In sample* is the same text that the tree was "
        f"made from. A text loops from its first {LOOP_TOKENS} tokens in a row that it had written "
        "before.",
    ]
    for table in tables(findings):
        lines += ["", f"## {table.title}", "", table.markdown()]
    for name, caption in pictures:
        lines += ["", f"![{caption}]({name})", "", caption]
    return "\n".join(lines) + "\n"


def tables(findings: Findings) -> list[Table]:
    """Return the report's tables."""
    result = [_acceptance_table(section) for section in findings.sections]
    result.append(_dynamic_table(findings, findings.dynamic))
    result.append(_accuracy_table(findings))
    if findings.checked:
        result.append(_check_table(findings))
    if findings.costs is not None:
        result.append(_cost_table(findings.costs))
    if findings.choice is not None:
        result.append(_choice_table(findings, findings.choice))
    return result


def _dynamic_values(dynamic: DynamicFindings) -> dict[str, Any]:
    return {
        "accepted": [asdict(accepted) for accepted in dynamic.accepted],
        "reliability": {
            source: [asdict(part) for part in bins] for source, bins in dynamic.reliability.items()
        },
    }


def summary(findings: Findings, out: Path) -> str:
    """Return the text for the terminal at the end."""
    shown = [table for table in tables(findings) if not table.title.startswith("Heads")]
    lines = [f"{table.title}\n\n{table.markdown()}\n" for table in shown]
    if findings.choice is None:
        lines.append("No step costs, so no tree schedule: the tree file holds the best trees.")
    elif findings.choice.schedule() is None:
        lines.append("No tree is faster at any batch size here, so there is no tree schedule.")
    return "\n".join([*lines, f"written to {out}"])


def _acceptance_table(section: Section) -> Table:
    curve = section.curve
    table = Table(
        f"Tokens per step, {section.title} ({curve.num_positions} positions)",
        ("tree", "joint, predicted", "in sample", "product, predicted", "in sample", "gain"),
    )
    for length, chain in enumerate(curve.chains, start=1):
        table.add(f"chain of {length}", _interval(chain), "", "", "", "")
    rows = zip(curve.methods["joint"], curve.methods["product"], curve.gain, strict=True)
    for joint, product, gain in rows:
        table.add(f"tree of {joint.size}", *_both(joint), *_both(product), _interval(gain, "+.3f"))
    return table


def _dynamic_table(findings: Findings, dynamic: DynamicFindings) -> Table:
    """Dynamic trees beside static ones of the same size, on the text of the first section."""
    table = Table(
        "Tokens per step of dynamic trees (every allowed node drafted), predicted",
        ("nodes", "dynamic", "static", "dynamic without looping text", "static without"),
    )
    static = [
        {estimate.size: estimate.predicted for estimate in section.curve.methods["joint"]}
        for section in findings.sections[:2]
    ]
    for found in dynamic.accepted:
        cells: list[str | None] = []
        for value, estimates in zip((found.with_loops, found.without_loops), static, strict=True):
            estimate = estimates.get(found.size)
            cells += [f"{value:.2f}", None if estimate is None else _interval(estimate)]
        table.add(found.size, *cells)
    return table


def _accuracy_table(findings: Findings) -> Table:
    sections = findings.sections
    table = Table(
        "Heads: share of positions whose token is among the first n of head 0/1/...",
        ("", *(section.title for section in sections)),
    )
    for top in sections[0].accuracy:
        cells = ["/".join(f"{share:.2f}" for share in s.accuracy[top]) for s in sections]
        table.add(f"top-{top}", *cells)
    return table


def _check_table(findings: Findings) -> Table:
    table = Table(
        f"Predicted and measured in the engine, on other prompts "
        f"(`{findings.settings.check_prompts}`), greedy",
        ("tree", "loops", "predicted", "measured", "predicted over measured"),
    )
    for checked in findings.checked:
        for with_loops in (True, False):
            predicted = findings.predicted(checked, with_loops)
            measured = checked.with_loops if with_loops else checked.without_loops
            table.add(
                f"{checked.method} of {checked.size}",
                "with" if with_loops else "without",
                _interval(predicted),
                _interval(measured),
                f"{100 * (predicted.value / measured.value - 1):+.1f} %",
            )
    return table


def _cost_table(costs: StepCosts) -> Table:
    drafts = sorted({(row.num_drafts, row.num_leaves) for row in costs.rows})
    names = [
        "none" if not n else f"chain of {n}" if leaves == 1 else f"tree of {n} ({leaves} leaves)"
        for n, leaves in drafts
    ]
    table = Table("Step time in ms: median over rounds (quartiles)", ("batch size", *names))
    cells_by_key = {
        (row.batch_size, row.num_drafts, row.num_leaves): _ms(row) for row in costs.rows
    }
    for batch_size in costs.batch_sizes:
        cells = [cells_by_key.get((batch_size, *key), "") for key in drafts]
        table.add(batch_size, *cells)
    return table


def _ms(row: StepCost) -> str:
    low, middle, high = row.quartiles_ms
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _choice_table(findings: Findings, choice: Choice) -> Table:
    table = Table(
        "Tree schedule: predicted speed-up over no speculation (at the quartiles of the cost)",
        ("batch size", "chosen", "tokens per step", "speed-up", "without loops", "tokens/s"),
    )
    without = findings.sections[1].curve
    lengths = [1.0, *(e.value for e in without.chains)]
    lengths += [e.predicted.value for e in without.methods["joint"]]
    for batch_size, index in sorted(choice.chosen.items()):
        candidate, prediction = choice.candidates[index], choice.predictions[batch_size][index]
        without_loops = prediction.speedup * lengths[index] / candidate.tokens_per_step
        table.add(
            batch_size,
            candidate.name,
            f"{candidate.tokens_per_step:.2f}",
            f"{prediction.speedup:.2f} ({prediction.low:.2f} to {prediction.high:.2f})",
            f"{without_loops:.2f}",
            f"{prediction.tokens_per_second:.0f}",
        )
    return table


def _both(estimate: SizeEstimate) -> tuple[str, str]:
    return _interval(estimate.predicted), f"{estimate.in_sample:.2f}"


def _interval(estimate: Estimate, form: str = ".2f") -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"
