"""What no draft tree exceeds."""

from __future__ import annotations

from dataclasses import dataclass

#: ``tree``: another tree for every request and step.
DYNAMIC = "dynamic"
#: Where the candidates of dynamic trees come from.
SOURCES = ("heads", "text")


@dataclass(frozen=True, kw_only=True)
class DynamicTrees:
    """Bounds of trees that are made anew for every request and step.

    Attributes:
        max_nodes: draft nodes of a request's tree.
        max_depth: depth of a tree; text goes on where the heads end.
        max_paths: leaf paths of a tree. On vLLM's V1 runner each costs a sequence of its own.
        sources: of candidates, some of `SOURCES`.
        learn: whether probabilities go on being learnt while serving.

    """

    max_nodes: int = 16
    max_depth: int = 12
    max_paths: int = 8
    sources: tuple[str, ...] = SOURCES
    learn: bool = True


@dataclass(frozen=True)
class TreeLimits:
    """What no draft tree of an engine exceeds: draft nodes, depth and fork paths."""

    max_nodes: int
    max_depth: int
    max_paths: int
