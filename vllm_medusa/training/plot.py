"""The figure of a training report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_medusa.reporting.plots import new_figure, plot_spreads, save_figure

#: The tree whose figures are drawn by category.
_TREE = "tree of 16"


def plot_report(report: Mapping[str, Any], path: Path) -> None:
    """Draw losses and acceptance over the steps, by tree size and by category; write a PNG."""
    texts = [("held out", report["held_out"])]
    texts += [
        (f"test {number}, temperature {test['temperature']:g}", test)
        for number, test in enumerate(report["tested"], 1)
    ]
    with_categories = [
        (name, figures)
        for name, figures in texts
        if "categories" in figures and _TREE in figures["with_loops"]["acceptance_length"]
    ]
    labels = [("step", "loss"), ("step", "tokens per step"), ("draft nodes", "tokens per step")]
    labels += [("", "tokens per step")] * bool(with_categories)
    figure, all_axes = new_figure(*labels, size=(5 * len(labels), 4))
    _plot_losses(all_axes[0], report)
    _plot_evaluations(all_axes[1], report)
    _plot_sizes(all_axes[2], texts)
    if with_categories:
        _plot_categories(all_axes[3], with_categories)
    save_figure(figure, path)


def _plot_losses(axes: Any, report: Mapping[str, Any]) -> None:
    steps = [point["step"] for point in report["loss"]]
    for k in range(len(report["loss"][0]["heads"])):
        losses = [point["heads"][k] for point in report["loss"]]
        axes.plot(steps, losses, linewidth=1, label=f"head {k} (token t+{k + 2})")
    axes.set_title("Loss on the rows learnt from")


def _plot_evaluations(axes: Any, report: Mapping[str, Any]) -> None:
    axes.plot(
        [point["step"] for point in report["evaluations"]],
        [point["expected_acceptance_length"] for point in report["evaluations"]],
        marker="o",
    )
    axes.axvline(report["best_step"], linestyle=":", color="grey")
    axes.set_title("Held out, best tree of 32 nodes")


def _plot_sizes(axes: Any, texts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Draw tokens per step of the trees by size, with loops and (dashed) without."""
    for number, (name, figures) in enumerate(texts):
        for key, line in (("with_loops", "-"), ("without_loops", "--")):
            lengths = figures[key]["acceptance_length"]
            trees = [tree for tree in lengths if tree.startswith("tree of ")]
            if not figures[key]["positions"] or not trees:
                continue
            sizes = [int(tree.removeprefix("tree of ")) for tree in trees]
            label = name if key == "with_loops" else None
            spreads = [(lengths[tree], *figures[key]["interval"][tree]) for tree in trees]
            plot_spreads(axes, sizes, spreads, color=f"C{number}", linestyle=line, label=label)
    axes.set_title("By tree size (dashed: without looping text)")


def _plot_categories(axes: Any, texts: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Draw tokens per step by category, with looping text."""
    names = sorted({name for _, figures in texts for name in figures["categories"]})
    for number, (text, figures) in enumerate(texts):
        found = {
            name: category["with_loops"]
            for name, category in figures["categories"].items()
            if category["with_loops"]["positions"]
        }
        places = [names.index(name) + 0.15 * number for name in found]
        spreads = [
            (each["acceptance_length"][_TREE], *each["interval"][_TREE]) for each in found.values()
        ]
        plot_spreads(axes, places, spreads, fmt="o", label=text)
    axes.set_xticks(range(len(names)), names, rotation=20)
    axes.set_title(f"By category, {_TREE}")
