"""The files that a training writes beside the heads: a tree, the provenance, a report."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.acceptance.trees import best_paths
from vllm_medusa.files import write_json
from vllm_medusa.heads.io.write import save_heads
from vllm_medusa.reporting.provenance import provenance
from vllm_medusa.training.evaluate import TREE_SIZES, summary
from vllm_medusa.training.loop import Outcome, Training, curve
from vllm_medusa.training.merged_model import save_merged
from vllm_medusa.training.model import write_format_of
from vllm_medusa.training.plot import plot_report
from vllm_medusa.training.report_page import markdown
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
        "held_out_temperature": outcome.continuations[0].temperature,
        "tested": [
            {
                "data": test.name,
                "temperature": test.temperature,
                "rows_left_out": test.num_known,
                **summary(continuations, paths),
            }
            for test, continuations in outcome.tested
        ],
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
        "steps": training.num_steps,
        "tokens_per_step": training.tokens_per_step,
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
