"""The files that a training writes beside the heads: a tree, the provenance, a report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.acceptance.texts import LOOP_TOKENS
from vllm_medusa.acceptance.trees import best_paths
from vllm_medusa.files import write_json
from vllm_medusa.heads.io.write import save_heads
from vllm_medusa.reporting.provenance import provenance
from vllm_medusa.training.evaluate import TREE_SIZES, summary
from vllm_medusa.training.loop import Outcome, Training, curve
from vllm_medusa.training.merged_model import save_merged
from vllm_medusa.training.model import write_format_of
from vllm_medusa.training.plot import plot_report
from vllm_medusa.training.run_directory import PROVENANCE


def write_heads(training: Training, outcome: Outcome, path: Path, out: Path) -> dict[str, Any]:
    """Write a directory with the finished heads and everything that belongs to them.

    If the target was trained too, the directory is the model with its heads.

    Args:
        training: the run.
        outcome: its end.
        path: the directory to make.
        out: its later name.

    Returns:
        the report's figures.

    Raises:
        UserError: it cannot be written.
    """
    settings = training.settings
    paths = best_paths([item.ranks for item in outcome.continuations], max(TREE_SIZES))
    base_model = settings.model
    if Path(base_model).exists() and not Path(base_model).is_absolute():
        base_model = os.path.relpath(base_model, out)
    checkpoint = outcome.heads.checkpoint(getattr(torch, settings.dtype), base_model)
    if paths:
        checkpoint = replace(checkpoint, tree_paths=[list(path) for path in paths])
    if outcome.after is None:
        save_heads(checkpoint, path, write_format_of(checkpoint))
    else:
        save_merged(training.target, checkpoint, path, training.beside)
    history = outcome.history
    report = {
        "held_out": summary(outcome.continuations, paths),
        "best_step": history.best_step,
        "evaluations": [
            {"step": step, "expected_acceptance_length": round(length, 4)}
            for step, length in history.evaluations
        ],
        "loss": [
            {"step": step, "heads": [round(loss, 5) for loss in losses]}
            for step, losses in curve(history.losses)
        ],
        **_of_joint(outcome),
    }
    write_json(path / PROVENANCE, made_by(training, outcome))
    write_json(path / "report.json", report)
    (path / "report.md").write_text(markdown(settings.model, report), encoding="utf-8")
    plot_report(report, path / "report.png")
    return report


def _of_joint(outcome: Outcome) -> dict[str, Any]:
    """Return what the report adds if the target was trained too."""
    history = outcome.history
    if outcome.after is None:
        return {}
    assert history.before is not None
    first = len(history.losses) - len(history.backbone_losses)
    return {
        "joint": {"before": history.before, "after": outcome.after},
        "backbone_loss": [
            {"step": first + step, "loss": round(loss, 5)}
            for step, [loss] in curve([[loss] for loss in history.backbone_losses])
        ],
    }


def made_by(training: Training, outcome: Outcome) -> dict[str, Any]:
    """Return how the heads came to be."""
    data = training.dataset
    return {
        **provenance(torch.cuda.get_device_name() if torch.cuda.is_available() else None),
        "model": training.settings.model,
        "data": training.settings.data,
        "identity": training.identity,
        "steps": outcome.num_steps,
        "tokens_per_step": outcome.tokens_per_step,
        "rows_learnt": len(data.train),
        "rows_held_out": len(data.held_out),
        "rows_cut": data.num_cut,
        "rows_without_answer": data.num_without_answer,
        "parameters": sum(parameter.numel() for parameter in outcome.heads.parameters()),
        "backbone_parameters": 0 if training.backbone is None else training.backbone.num_trained,
        "seconds": round(outcome.history.seconds),
        "threads": torch.get_num_threads(),
        "device": str(training.target.weight.device.type),
    }


def markdown(model: str, report: Mapping[str, Any]) -> str:
    """Return the report as a page of Markdown."""
    both = [("with looping text", "with_loops"), ("without", "without_loops")]
    columns = [report["held_out"][key] for _, key in both]
    lines = [
        "# Training report",
        "",
        f"Medusa heads for `{model}`, the best of {len(report['evaluations'])} measurements (after "
        f"step {report['best_step']}), on held-out answers that they did not learn from. An answer "
        f"loops from its first {LOOP_TOKENS} tokens in a row that it had written before.",
        "",
        "| held out | " + " | ".join(name for name, _ in both) + " |",
        "|---|" + "---:|" * len(both),
        "| positions | " + " | ".join(str(column["positions"]) for column in columns) + " |",
    ]
    for name in columns[0]["accuracy"]:
        cells = [" / ".join(f"{x:.3f}" for x in column["accuracy"][name]) for column in columns]
        lines.append(f"| {name} accuracy, head by head | " + " | ".join(cells) + " |")
    for name in columns[0]["acceptance_length"]:
        cells = [
            f"{column['acceptance_length'][name]:.3f} ({low:.2f} to {high:.2f})"
            for column in columns
            for low, high in [column["interval"][name]]
        ]
        lines.append(f"| tokens per step, {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        *_joint_lines(report.get("joint")),
        "Tokens per step, with the 95 % interval of a bootstrap over the prompts, are simulated "
        "exactly along the held-out answers, with the trees of "
        "`medusa_tree.json`, which come from the same answers: `vllm-medusa calibrate` measures "
        "trees on others.",
        "",
        "![loss and acceptance length](report.png)",
    ]
    return "\n".join(lines) + "\n"


def _joint_lines(joint: Mapping[str, Any] | None) -> Sequence[str]:
    """The part of the page that says what training the target too has changed."""
    if joint is None:
        return []
    before, after = joint["before"], joint["after"]
    rows = [
        ("perplexity of the held-out answers", "perplexity", ".4f"),
        ("share of their tokens that it finds likeliest", "top_1", ".4f"),
    ]
    lines = [
        "The target was trained too. *Before* is what the steps that trained it began with. The "
        "answers are those of the target before: it would give others now, on which `vllm-medusa "
        "calibrate` measures.",
        "",
        "| the target, and tokens per step with looping text | before | after |",
        "|---|---:|---:|",
    ]
    for label, key, form in rows:
        cells = [format(part["target"][key], form) for part in (before, after)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lengths = [part["held_out"]["with_loops"]["acceptance_length"] for part in (before, after)]
    for name in lengths[1]:
        cells = [f"{part[name]:.3f}" if name in part else "" for part in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]
