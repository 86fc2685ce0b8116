"""What no draft tree exceeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        shared_text: whether outputs of requests that have finished are a source too.
        learn: whether probabilities go on being learnt while serving.
        measure_costs: whether step costs are measured at start-up, to draft what pays; if not, each
            step drafts as many nodes as may be.

    """

    max_nodes: int = 16
    max_depth: int = 12
    max_paths: int = 8
    sources: tuple[str, ...] = SOURCES
    shared_text: bool = False
    learn: bool = True
    measure_costs: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DynamicTrees:
        """Make the bounds of JSON values; what is left out is as by default."""
        given = dict(values)
        if "sources" in given:
            given["sources"] = tuple(given["sources"])
        return cls(**given)


@dataclass(frozen=True)
class TreeLimits:
    """What no draft tree of an engine exceeds: draft nodes, depth and fork paths."""

    max_nodes: int
    max_depth: int
    max_paths: int
