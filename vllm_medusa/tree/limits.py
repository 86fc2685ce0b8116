"""Upper limits of draft trees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Where the candidates of dynamic trees come from.
SOURCES = ("heads", "text")


@dataclass(frozen=True, kw_only=True)
class DynamicTrees:
    """Limits of dynamic trees, which are new for each request in each step.

    Attributes:
        max_nodes: most draft nodes of a request's tree.
        max_depth: largest depth of a tree. With text as a source it can exceed the number of heads.
        max_paths: most leaf paths of a tree. On vLLM's V1 runner each needs its own sequence.
        sources: sources of candidates, some of `SOURCES`.
        shared_text: whether outputs of finished requests are a source too.
        learn: whether the curves learn while serving.
        measure_costs: whether step costs are measured at start-up, to draft only what pays; if not,
            each step drafts as many nodes as the limits allow.

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
        """Make the limits from JSON values; missing keys have their defaults."""
        given = dict(values)
        if "sources" in given:
            given["sources"] = tuple(given["sources"])
        return cls(**given)


@dataclass(frozen=True)
class TreeLimits:
    """Most draft nodes, depth and most fork paths of an engine's draft trees."""

    max_nodes: int
    max_depth: int
    max_paths: int
