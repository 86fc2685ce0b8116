"""The pictures of a comparison, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_medusa.bench.figures import Figures, by_batch_size
from vllm_medusa.bench.variants import BASELINE
from vllm_medusa.reporting.plots import new_figure, save_figure


def plot_offline(out: Path, figures: Sequence[Figures]) -> list[tuple[str, str]]:
    """Draw what there is to draw; return file name and caption of each picture."""
    variants = {name: rows for name, rows in by_batch_size(figures).items() if name != BASELINE}
    plots = []
    if any(row.speedup for rows in variants.values() for row in rows):
        plots += [_speedup_by_batch(out, variants), _speedup_by_tokens_per_step(out, variants)]
    if any(row.acceptance_by_depth for rows in variants.values() for row in rows):
        plots.append(_acceptance_by_depth(out, variants))
    return plots


def _speedup_by_batch(out: Path, variants: Mapping[str, Sequence[Figures]]) -> tuple[str, str]:
    figure, (axes,) = new_figure(("batch size", "tokens per second over the baseline's"))
    sizes = sorted({row.batch_size for rows in variants.values() for row in rows})
    for name, rows in variants.items():
        shown = [(row.batch_size, row.speedup) for row in rows if row.speedup]
        axes.errorbar(
            [size for size, _ in shown],
            [speedup.median for _, speedup in shown],
            yerr=[
                [speedup.median - speedup.low for _, speedup in shown],
                [speedup.high - speedup.median for _, speedup in shown],
            ],
            marker="o",
            capsize=3,
            label=name,
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    return save_figure(figure, out / "speedup_by_batch.png", "Speed-up by batch size")


def _speedup_by_tokens_per_step(
    out: Path, variants: Mapping[str, Sequence[Figures]]
) -> tuple[str, str]:
    figure, (axes,) = new_figure(("tokens per step", "tokens per second over the baseline's"))
    largest = 1.0
    for name, rows in variants.items():
        shown = [(row.tokens_per_step.median, row.speedup.median) for row in rows if row.speedup]
        largest = max([largest, *(steps for steps, _ in shown)])
        axes.plot(*zip(*shown, strict=True), marker="o", linewidth=0.6, label=name)
        for row in rows:
            if row.speedup:
                at = (row.tokens_per_step.median, row.speedup.median)
                axes.annotate(str(row.batch_size), at, (4, 4), textcoords="offset points", size=7)
    axes.plot([1, largest], [1, largest], color="black", linewidth=0.8, linestyle="--")
    axes.axhline(1, color="black", linewidth=0.8)
    caption = (
        "Speed-up against tokens per step (numbers: batch size; dashed: a step costs nothing more)"
    )
    return save_figure(figure, out / "speedup_by_tokens_per_step.png", caption)


def _acceptance_by_depth(out: Path, variants: Mapping[str, Sequence[Figures]]) -> tuple[str, str]:
    figure, (axes,) = new_figure(("depth", "share of drafts accepted so deep"))
    deepest = 1
    for name, rows in variants.items():
        shares = rows[0].acceptance_by_depth
        if shares:
            deepest = max(deepest, len(shares))
            label = f"{name} (batch {rows[0].batch_size})"
            axes.plot(range(1, len(shares) + 1), shares, marker="o", label=label)
    axes.set_xticks(range(1, deepest + 1))
    axes.set_ylim(0, 1)
    return save_figure(figure, out / "acceptance_by_depth.png", "Acceptance by depth")
