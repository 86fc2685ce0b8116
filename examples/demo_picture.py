"""Draw the draft tree of one step, and what of it was accepted: for `demo.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ACCEPTED, REJECTED, ROOT = "#b7e4c7", "#e9ecef", "#cfe2ff"


@dataclass(frozen=True)
class VerifiedTree:
    """One step of one request.

    Attributes:
        root: the last token that was sampled before the step.
        tokens: of each draft node.
        parents: of each draft node; 0 is the root, the first draft node is 1.
        sampled: tokens that the step gave: the accepted ones and one more.

    """

    root: int
    tokens: list[int]
    parents: list[int]
    sampled: list[int]

    @cached_property
    def accepted(self) -> list[int]:
        """The draft nodes that were accepted, from the root down."""
        node, path = 0, []
        for token in self.sampled[:-1]:
            node = next(
                child
                for child, parent in enumerate(self.parents, start=1)
                if parent == node and self.tokens[child - 1] == token
            )
            path.append(node)
        return path

    @property
    def depths(self) -> list[int]:
        """Depth of each node, the root first."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths

    def heights(self) -> list[float]:
        """Vertical place of each node: leaves in rows, a parent amid its children."""
        heights = [0.0] * (len(self.parents) + 1)
        num_leaves = 0
        for node in self._children_first(0):
            children = self._children(node)
            if children:
                heights[node] = sum(heights[child] for child in children) / len(children)
            else:
                heights[node] = -float(num_leaves)
                num_leaves += 1
        return heights

    def _children(self, node: int) -> list[int]:
        return [child for child, parent in enumerate(self.parents, start=1) if parent == node]

    def _children_first(self, node: int) -> list[int]:
        below = [each for child in self._children(node) for each in self._children_first(child)]
        return [*below, node]


def draw(tree: VerifiedTree, tokenizer: Any, out: Path) -> None:
    """Draw a tree into a file, whose ending says which kind of picture."""
    places = list(zip(tree.depths, tree.heights(), strict=True))
    accepted = {0, *tree.accepted}
    labels = [repr(tokenizer.decode([token])) for token in (tree.root, *tree.tokens)]
    height = 1.2 + 0.55 * (1 - min(place[1] for place in places))
    figure, axes = plt.subplots(figsize=(2.0 + 1.6 * (max(tree.depths) + 1), height))
    for child, parent in enumerate(tree.parents, start=1):
        style = {"color": "#2d6a4f", "lw": 2} if child in accepted else {"color": "#adb5bd"}
        axes.plot(*zip(places[parent], places[child], strict=True), zorder=1, **style)
    for node, (place, label) in enumerate(zip(places, labels, strict=True)):
        box(
            axes,
            place,
            label,
            ACCEPTED if node and node in accepted else REJECTED if node else ROOT,
        )
    last = places[max(accepted, key=lambda node: places[node][0])]
    bonus = repr(tokenizer.decode(tree.sampled[-1:]))
    axes.annotate(
        f"then {bonus}, the target's own",
        last,
        xytext=(0, -22),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    axes.set_title(
        f"{len(tree.accepted)} of {len(tree.tokens)} draft tokens accepted (green): "
        f"{len(tree.sampled)} tokens in one step",
        fontsize=10,
    )
    axes.margins(x=0.15, y=0.3)
    axes.axis("off")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150, bbox_inches="tight")
    plt.close(figure)


def box(axes: Axes, place: tuple[float, float], label: str, colour: str) -> None:
    """Write a token into a box."""
    style = {"boxstyle": "round,pad=0.4", "facecolor": colour, "edgecolor": "#495057"}
    axes.text(
        *place,
        label,
        ha="center",
        va="center",
        family="monospace",
        fontsize=9,
        bbox=style,
        zorder=2,
    )
