"""The configuration that every process of the engine reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import TypeAdapter

from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.limits import DynamicTrees, TreeLimits
from vllm_medusa.tree.step_trees import path_starts
from vllm_medusa.tree.typical import TypicalRule

#: Key of `MedusaConfig.to_dict` in vLLM's ``additional_config``.
CONFIG_KEY = "medusa"

#: vLLM's ``num_speculative_tokens_per_batch_size``: first batch size, last one, draft nodes.
SizesByBatch = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """The resolved configuration that every process of the engine reads.

    Attributes:
        heads: directory, file or hub name of the heads.
        revision: hub revision of the heads.
        tree: the draft tree. With trees by batch size it is the largest; the others are its first
            nodes. With dynamic trees it holds the rank paths that the heads' nodes are chosen from.
        tree_name: how the tree was chosen, for messages.
        sizes_by_batch: number of its nodes that are drafted, by batch size; None: always all.
        max_tree_requests: as in `MedusaOptions`.
        dynamic: limits of the trees if they are dynamic.
        typical: the rule of typical acceptance; None: acceptance is lossless.
        in_turn: whether the heads run one after the other, each on the path of the one before
            (Hydra).

    """

    heads: str
    revision: str | None
    tree: DraftTree
    tree_name: str
    sizes_by_batch: SizesByBatch | None = None
    max_tree_requests: int | None = None
    dynamic: DynamicTrees | None = None
    typical: TypicalRule | None = None
    in_turn: bool = False

    @cached_property
    def limits(self) -> TreeLimits:
        """Upper limits of the draft trees."""
        if self.dynamic is not None:
            nodes, depth = self.dynamic.max_nodes, self.dynamic.max_depth
            return TreeLimits(nodes, min(depth, nodes), min(self.dynamic.max_paths, nodes))
        tree = self.tree
        return TreeLimits(tree.num_draft_tokens, tree.depth, len(path_starts(tree.parents[1:])))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MedusaConfig:
        """Rebuild a configuration from `to_dict`."""
        return _ADAPTER.validate_python(values)


_ADAPTER = TypeAdapter(MedusaConfig)
