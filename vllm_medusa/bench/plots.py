"""The pictures of a comparison, as PNG files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_medusa.bench.figures import ONLINE, Figures, Kind, load_name
from vllm_medusa.bench.results import PLOTS
from vllm_medusa.bench.variants import BASELINE
from vllm_medusa.reporting.plots import new_figure, plot_spreads, save_figure

_SPEEDUP = "tokens per second over the baseline's"
_BESIDE = {"xytext": (4, 4), "textcoords": "offset points", "size": 7}


def plot(out: Path, figures: Sequence[Figures], kind: Kind) -> list[tuple[str, str]]:
    """Draw all pictures that have data; return file name and caption of each."""
    variants: dict[str, list[Figures]] = defaultdict(list)
    for row in figures:
        variants[row.variant].append(row)
    if kind is ONLINE:
        return [_latency_by_throughput(out, variants)]
    del variants[BASELINE]
    compared = {
        name: found for name, rows in variants.items() if (found := [r for r in rows if _speed(r)])
    }
    plots = []
    if compared:
        plots += [_speedup_by_batch(out, compared), _speedup_by_tokens_per_step(out, compared)]
    if any(row.acceptance_by_depth for rows in variants.values() for row in rows):
        plots.append(_acceptance_by_depth(out, variants))
    return plots


def _speed(row: Figures) -> float:
    return row.median("speedup")


def _speedup_by_batch(out: Path, variants: Mapping[str, Sequence[Figures]]) -> tuple[str, str]:
    figure, (axes,) = new_figure(("batch size", _SPEEDUP))
    sizes = sorted({int(row.load) for rows in variants.values() for row in rows})
    for name, rows in variants.items():
        found = [speedup for row in rows if (speedup := row.spreads["speedup"])]
        spreads = [(speedup.median, speedup.low, speedup.high) for speedup in found]
        plot_spreads(axes, [int(row.load) for row in rows], spreads, marker="o", label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    return save_figure(figure, out / PLOTS[0], "Speed-up by batch size")


def _speedup_by_tokens_per_step(
    out: Path, variants: Mapping[str, Sequence[Figures]]
) -> tuple[str, str]:
    figure, (axes,) = new_figure(("tokens per step", _SPEEDUP))
    largest = 1.0
    for name, rows in variants.items():
        points = [(row.median("tokens_per_step"), _speed(row)) for row in rows]
        largest = max([largest, *(steps for steps, _ in points)])
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=0.6, label=name)
        for row, at in zip(rows, points, strict=True):
            axes.annotate(str(row.load), at, **_BESIDE)
    axes.plot([1, largest], [1, largest], color="black", linewidth=0.8, linestyle="--")
    axes.axhline(1, color="black", linewidth=0.8)
    caption = (
        "Speed-up against tokens per step (numbers: batch size; dashed: if a step cost no more)"
    )
    return save_figure(figure, out / PLOTS[1], caption)


def _acceptance_by_depth(out: Path, variants: Mapping[str, Sequence[Figures]]) -> tuple[str, str]:
    figure, (axes,) = new_figure(("depth", "share of drafts accepted at this depth"))
    deepest = 1
    for name, (first, *_) in variants.items():
        if shares := first.acceptance_by_depth:
            deepest = max(deepest, len(shares))
            label = f"{name} ({load_name(first.load)})"
            axes.plot(range(1, len(shares) + 1), shares, marker="o", label=label)
    axes.set_xticks(range(1, deepest + 1))
    axes.set_ylim(0, 1)
    return save_figure(figure, out / PLOTS[2], "Acceptance by depth")


def _latency_by_throughput(out: Path, variants: Mapping[str, Sequence[Figures]]) -> tuple[str, str]:
    labels = ("tokens per second, of all requests", "median time of a request, s")
    figure, (axes,) = new_figure(labels)
    for name, rows in variants.items():
        points = [(row.median("tokens_per_s"), row.median("e2e_ms") / 1000) for row in rows]
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=0.8, label=name)
        for row, at in zip(rows, points, strict=True):
            axes.annotate(str(row.load), at, **_BESIDE)
    axes.set_ylim(bottom=0)
    return save_figure(figure, out / PLOTS[3], "Latency against throughput")
