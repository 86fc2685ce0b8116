"""Figures as PNG or SVG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_medusa.errors import UserError

#: Endings of pictures' names, and what is left out of each kind's metadata.
PICTURE_KINDS = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}


def check_matplotlib(extra: str) -> None:
    """Raise at once, not after hours, if figures cannot be drawn.

    Args:
        extra: the extra of this package that installs matplotlib.

    Raises:
        UserError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UserError(f'drawing the figures needs matplotlib: pip install "vllm-medusa[{extra}]"')


def empty_figure(size: tuple[float, float]) -> Any:
    """A figure of a size in inches, without axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_figure(
    *labels: tuple[str, str], size: tuple[float, float] = (7, 4.5)
) -> tuple[Any, Sequence[Any]]:
    """An empty figure and its axes, side by side.

    Args:
        labels: of the x and y axis of each pair of axes.
        size: of the figure, in inches.
    """
    figure = empty_figure(size)
    all_axes = figure.subplots(1, len(labels), squeeze=False)[0]
    for axes, (x_label, y_label) in zip(all_axes, labels, strict=True):
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
    return figure, all_axes


def plot_spreads(
    axes: Any, x: Sequence[float], spreads: Sequence[tuple[float, float, float]], **style: Any
) -> None:
    """Draw values with bars.

    Args:
        axes: to draw on.
        x: of each value.
        spreads: value, lower and upper end of its bar.
        style: of `matplotlib.axes.Axes.errorbar`.
    """
    values = [value for value, _, _ in spreads]
    below = [value - low for value, low, _ in spreads]
    above = [high - value for value, _, high in spreads]
    axes.errorbar(x, values, yerr=[below, above], capsize=3, **style)


def save_figure(figure: Any, path: Path, caption: str = "") -> tuple[str, str]:
    """Write a figure with its legends; return the file's name and the caption.

    Args:
        figure: to write.
        path: its ending, one of `PICTURE_KINDS`, says which kind of picture.
        caption: above each of the axes.
    """
    from matplotlib import rc_context

    for axes in figure.axes:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        if caption:
            axes.set_title(caption, fontsize=9)
    # Without version, date and random names in it: the same figure is the same file.
    with rc_context({"svg.hashsalt": "vllm_medusa", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=110, metadata=PICTURE_KINDS[path.suffix])
    return path.name, caption
