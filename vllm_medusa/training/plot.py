"""The figure of a training report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_medusa.reporting.plots import new_figure, save_figure


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """Draw each head's loss and the acceptance length over the steps, and write a PNG."""
    figure, (left, right) = new_figure(("step", "loss"), ("step", "tokens per step"), size=(10, 4))
    steps = [point["step"] for point in report["loss"]]
    for k in range(len(report["loss"][0]["heads"])):
        losses = [point["heads"][k] for point in report["loss"]]
        left.plot(steps, losses, linewidth=1, label=f"head {k} (token t+{k + 2})")
    left.set_title("Loss on the rows learnt from")
    right.plot(
        [point["step"] for point in report["evaluations"]],
        [point["expected_acceptance_length"] for point in report["evaluations"]],
        marker="o",
    )
    right.axvline(report["best_step"], linestyle=":", color="grey")
    right.set_title("Held out, best tree of 32 nodes")
    save_figure(figure, path)
