"""The figure of a training report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """Draw each head's loss and the acceptance length over the steps, and write a PNG."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [point["step"] for point in report["loss"]]
    for k in range(len(report["loss"][0]["heads"])):
        losses = [point["heads"][k] for point in report["loss"]]
        left.plot(steps, losses, linewidth=1, label=f"head {k} (token t+{k + 2})")
    left.set(xlabel="step", ylabel="loss", title="Loss on the rows learnt from")
    left.legend()
    right.plot(
        [point["step"] for point in report["evaluations"]],
        [point["expected_acceptance_length"] for point in report["evaluations"]],
        marker="o",
    )
    right.axvline(report["best_step"], linestyle=":", color="grey")
    right.set(xlabel="step", ylabel="tokens per step", title="Held out, best tree of 32 nodes")
    figure.savefig(path, dpi=100)
