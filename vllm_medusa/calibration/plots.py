"""The pictures of a calibration, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_medusa.calibration.choice import Choice
from vllm_medusa.calibration.dynamic import Bin
from vllm_medusa.calibration.findings import Findings
from vllm_medusa.reporting.plots import new_figure, plot_spreads, save_figure
from vllm_medusa.tree.draft_tree import DraftTree, TreePath

_COLOURS = {"joint": "tab:blue", "product": "tab:orange"}


def draw_acceptance(findings: Findings, out: Path) -> tuple[str, str]:
    """Draw tokens per step by tree size; return file name and caption."""
    figure, (axes,) = new_figure(("draft nodes", "tokens per step"), size=(7.5, 4.8))
    for with_loops, style in ((True, "-"), (False, "--")):
        section = next(s for s in findings.sections if s.with_loops == with_loops)
        suffix = "" if with_loops else ", without looping text"
        for method, sizes in section.curve.methods.items():
            x = [estimate.size for estimate in sizes]
            predicted = [estimate.predicted for estimate in sizes]
            colour = _COLOURS[method]
            label = f"{method}, predicted{suffix}"
            axes.plot(x, [p.value for p in predicted], style, color=colour, label=label)
            if method == "joint":
                low, high = [p.low for p in predicted], [p.high for p in predicted]
                axes.fill_between(x, low, high, color=colour, alpha=0.15)
        for method, colour in _COLOURS.items():
            measured = [
                (c.size, c.with_loops if with_loops else c.without_loops)
                for c in findings.checked
                if c.method == method
            ]
            if measured:
                plot_spreads(
                    axes,
                    [size for size, _ in measured],
                    [(found.value, found.low, found.high) for _, found in measured],
                    fmt="o" if with_loops else "s",
                    color=colour,
                    markersize=5,
                    label=f"{method}, measured in the engine{suffix}",
                )
    return save_figure(
        figure,
        out / "calibration-acceptance.png",
        "Tokens per step by tree size; bands and bars are 95 % intervals over prompts",
    )


def draw_tree(findings: Findings, out: Path) -> tuple[str, str]:
    """Draw the chosen tree with the probabilities of its nodes; return file name and caption."""
    paths = sorted(findings.drawn_tree())
    probabilities = findings.probabilities
    places = _places(paths)
    num_leaves = len(DraftTree.from_paths(paths).leaves)
    size = (max(6.0, 0.42 * num_leaves), 1.2 + 1.1 * findings.num_heads)
    figure, (axes,) = new_figure(("", ""), size=size)
    for path, (x, y) in places.items():
        if not path:
            axes.annotate("root", (x, y), ha="center", va="center", fontsize=8)
            continue
        parent_x, parent_y = places[path[:-1]]
        probability = probabilities.get(path, 0.0)
        axes.plot(
            [parent_x, x], [parent_y, y], color="grey", linewidth=0.3 + 4 * probability, zorder=1
        )
        axes.scatter(
            [x],
            [y],
            s=60 + 500 * probability,
            color="tab:blue",
            zorder=2,
            alpha=0.35 + 0.65 * probability,
        )
        axes.annotate(f"{path[-1]}", (x, y), ha="center", va="center", fontsize=7, zorder=3)
        axes.annotate(
            f"{100 * probability:.1f}",
            (x, y - 0.24),
            ha="center",
            va="center",
            fontsize=6,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )
    axes.set_ylim(-findings.num_heads - 0.45, 0.3)
    axes.set_axis_off()
    return save_figure(
        figure,
        out / "calibration-tree.png",
        f"Tree of {len(paths)} nodes: the rank of each, and how often its path is right (%)",
    )


def draw_reliability(reliability: Mapping[str, Sequence[Bin]], out: Path) -> tuple[str, str]:
    """Draw predicted and observed shares of right candidates; return file name and caption."""
    labels = ("predicted probability of a candidate", "share that was right")
    figure, (axes,) = new_figure(labels, size=(5.5, 5))
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="as predicted")
    for source, bins in reliability.items():
        x, y = [part.predicted for part in bins], [part.observed for part in bins]
        axes.plot(x, y, marker="o", markersize=4, label=source)
    return save_figure(
        figure,
        out / "calibration-reliability.png",
        "Candidates with a right parent, on prompts not fitted to",
    )


def draw_speedup(choice: Choice, out: Path) -> tuple[str, str]:
    """Draw the predicted speed-up by batch size; return file name and caption."""
    labels = ("batch size", "predicted tokens per second over no speculation")
    figure, (axes,) = new_figure(labels)
    batch_sizes = sorted(choice.chosen)
    shown = [i for i, c in enumerate(choice.candidates) if c.paths]
    chains = [i for i in shown if choice.candidates[i].name.startswith("chain")]
    for index in [*chains[-1:], *(i for i in shown if i not in chains)]:
        speedups = [choice.predictions[size][index].speedup for size in batch_sizes]
        axes.plot(
            batch_sizes, speedups, linewidth=1, marker=".", label=choice.candidates[index].name
        )
    chosen = [choice.predictions[size][choice.chosen[size]] for size in batch_sizes]
    spreads = [(p.speedup, p.low, p.high) for p in chosen]
    plot_spreads(axes, batch_sizes, spreads, color="black", linewidth=2, label="chosen")
    axes.axhline(1, color="grey", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batch_sizes, [str(size) for size in batch_sizes])
    return save_figure(
        figure,
        out / "calibration-speedup.png",
        "Predicted speed-up by batch size; bars are the quartiles of the measured step cost",
    )


def _places(paths: Sequence[TreePath]) -> dict[TreePath, tuple[float, float]]:
    """Places of the nodes: leaves side by side, a parent above the middle of its children."""
    children: dict[TreePath, list[TreePath]] = {}
    for path in paths:
        children.setdefault(path[:-1], []).append(path)
    places: dict[TreePath, tuple[float, float]] = {}
    num_leaves = 0

    def place(path: TreePath) -> float:
        nonlocal num_leaves
        below = [place(child) for child in children.get(path, [])]
        x = (below[0] + below[-1]) / 2 if below else float(num_leaves)
        num_leaves += not below
        places[path] = (x, -float(len(path)))
        return x

    place(())
    return places
