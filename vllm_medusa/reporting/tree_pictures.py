"""Pictures of draft trees: sources, path probabilities and accepted nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_medusa.reporting.plots import empty_figure, save_figure

#: Colour of a node by its sources; a static tree has none.
_COLOURS = {
    ("heads",): "#bcd9ff",
    ("text",): "#ffdf9e",
    ("heads", "text"): "#dcc6f5",
    ("shared_text",): "#ffc9c9",
    ("heads", "shared_text"): "#f3b8e6",
    ("text", "shared_text"): "#ffb98a",
    ("heads", "text", "shared_text"): "#c9a0dc",
    (): "#e9ecef",
}
_ROOT, _EDGE, _ACCEPTED = "#ffffff", "#adb5bd", "#2d6a4f"
#: Size in inches of a node's place, and of the space above and below a tree.
_NODE_WIDTH, _NODE_HEIGHT, _TREE_MARGIN = 1.5, 0.55, 0.9


@dataclass(frozen=True)
class VerifiedTree:
    """One step of one request.

    Attributes:
        step: number of the engine's step that verified it; the prompt's step is 0.
        root: the last sampled token before the step.
        tokens: of each draft node.
        parents: of each draft node; 0 is the root, the first draft node is 1.
        sampled: tokens of the step: the accepted ones and one more.
        probability: path probability of each node; empty if not known.
        sources: sources of each node; empty if not known.
    """

    step: int
    root: int
    tokens: list[int]
    parents: list[int]
    sampled: list[int]
    probability: Sequence[float] = ()
    sources: Sequence[Sequence[str]] = ()

    @classmethod
    def of_events(cls, events: Sequence[dict[str, Any]]) -> list[VerifiedTree]:
        """Return the trees among the events that `engines.watching` wrote."""
        names = {field.name for field in fields(cls)}
        return [cls(**event) for event in events if event.keys() <= names]

    @cached_property
    def accepted(self) -> list[int]:
        """The draft nodes that were accepted, from the root down."""
        node, path = 0, []
        for token in self.sampled[:-1]:
            node = next(c for c in self._children(node) if self.tokens[c - 1] == token)
            path.append(node)
        return path

    @cached_property
    def depths(self) -> list[int]:
        """Depth of each node, the root first."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return depths

    @cached_property
    def heights(self) -> list[float]:
        """Vertical place of each node, the root first: leaves in rows, a parent amid its children.

        The first leaf is at 0, the others are below.
        """
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

    def source_of(self, node: int) -> tuple[str, ...]:
        """The sources of a draft node."""
        return tuple(self.sources[node - 1]) if self.sources else ()

    def _children(self, node: int) -> list[int]:
        return [child for child, parent in enumerate(self.parents, start=1) if parent == node]

    def _children_first(self, node: int) -> list[int]:
        below = [each for child in self._children(node) for each in self._children_first(child)]
        return [*below, node]


def draw_trees(
    trees: Sequence[VerifiedTree], decode: Callable[[list[int]], str], out: Path
) -> None:
    """Draw trees, one below the other.

    Args:
        trees: at least one.
        decode: tokens to text.
        out: the file, of one of `plots.PICTURE_KINDS`.
    """
    heights = [_TREE_MARGIN + _NODE_HEIGHT * (1 - min(tree.heights)) for tree in trees]
    width = _NODE_WIDTH * (1 + max(max(tree.depths) for tree in trees))
    figure = empty_figure((max(width, 5.0), sum(heights) + 0.5))
    grid = figure.subplots(len(trees), 1, squeeze=False, height_ratios=heights)
    deepest = max(max(tree.depths) for tree in trees)
    for tree, (axes,) in zip(trees, grid, strict=True):
        _draw(axes, tree, decode)
        axes.set(xlim=(-0.5, deepest + 0.5), ylim=(min(tree.heights) - 1, 0.7))
    _add_legend(figure, trees)
    save_figure(figure, out)


def _draw(axes: Any, tree: VerifiedTree, decode: Callable[[list[int]], str]) -> None:
    places = list(zip(tree.depths, tree.heights, strict=True))
    path = [0, *tree.accepted]
    for child, parent in enumerate(tree.parents, start=1):
        style = {"color": _ACCEPTED, "lw": 2} if child in path else {"color": _EDGE}
        axes.plot(*zip(places[parent], places[child], strict=True), zorder=1, **style)
    for node, (place, token) in enumerate(zip(places, [tree.root, *tree.tokens], strict=True)):
        label = repr(decode([token]))
        if node and tree.probability:
            label += f"\n{tree.probability[node - 1]:.2f}"
        colour = _COLOURS[tree.source_of(node)] if node else _ROOT
        _write_box(axes, place, label, colour, is_accepted=node in path[1:])
    x, y = places[path[-1]]
    bonus = f"then {decode(tree.sampled[-1:])!r}, the target's own"
    _write(axes, (x, y - 0.62), bonus, fontsize=7, style="italic")
    axes.set_title(
        f"step {tree.step}: {len(tree.accepted)} of {len(tree.tokens)} draft tokens accepted: "
        f"{len(tree.sampled)} tokens in one step",
        fontsize=9,
        loc="left",
    )
    axes.axis("off")


def _write_box(
    axes: Any, place: tuple[float, float], label: str, colour: str, *, is_accepted: bool
) -> None:
    """Write a node's text into a box."""
    edge = {"edgecolor": _ACCEPTED, "linewidth": 2} if is_accepted else {"edgecolor": _EDGE}
    box = {"boxstyle": "round,pad=0.3", "facecolor": colour, **edge}
    _write(axes, place, label, family="monospace", fontsize=8, bbox=box, zorder=2)


def _write(axes: Any, place: tuple[float, float], text: str, **style: Any) -> None:
    # Dollar signs do not begin mathematics here.
    axes.text(*place, text, ha="center", va="center", parse_math=False, **style)


def _add_legend(figure: Any, trees: Sequence[VerifiedTree]) -> None:
    """Add a legend of the colours that occur."""
    from matplotlib.patches import Patch

    occurring = {tree.source_of(node + 1) for tree in trees for node in range(len(tree.tokens))}
    named = [
        Patch(
            facecolor=colour,
            edgecolor=_EDGE,
            label=" and ".join(name.replace("_", " ") for name in names) or "draft",
        )
        for names, colour in _COLOURS.items()
        if names in occurring
    ]
    accepted = Patch(facecolor="white", edgecolor=_ACCEPTED, linewidth=2, label="accepted")
    figure.legend(handles=[*named, accepted], loc="outside lower center", ncols=5, fontsize=8)
