"""The plugin's configuration: what a user may write, checked, and what travels to every process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_medusa.tree import named
from vllm_medusa.tree.draft_tree import DraftTree, TreeError, TreePath, read_tree_file

#: Key of `MedusaConfig.to_dict` in vLLM's ``additional_config``.
CONFIG_KEY = "medusa"


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the setting, the value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class MedusaRequest:
    """What the user asked for in vLLM's ``speculative_config``.

    Attributes:
        model: directory, file or hub name of the heads; None: the target model's own directory.
        revision: hub revision of the heads.
        tree: ``"auto"``, a named tree, the path of a tree file, or a list of paths.
        num_speculative_tokens: number of draft nodes; must agree with a tree that is given.
        acceptance: ``"lossless"`` is the only rule so far.
        max_tree_requests: how many requests may hold fork blocks at once; None: as many as an
            eighth of the KV cache allows. Requests beyond them draft a chain.

    """

    model: str | None = None
    revision: str | None = None
    tree: str | Sequence[Sequence[int]] = "auto"
    num_speculative_tokens: int | None = None
    acceptance: str = "lossless"
    max_tree_requests: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MedusaRequest:
        """Check the values of a ``speculative_config`` whose method is ``medusa``.

        Raises:
            ConfigError: if a key is not known or a value is not allowed.

        """
        known = [field.name for field in dataclasses.fields(cls)]
        given = {key.replace("-", "_"): value for key, value in values.items()}
        given.pop("method", None)
        for key in given:
            if key not in known:
                raise ConfigError(
                    f"speculative_config has {key!r}, which method 'medusa' does not know; "
                    f"use {', '.join(known)}"
                )
        request = cls(**{key: value for key, value in given.items() if value is not None})
        request._check()
        return request

    def _check(self) -> None:
        if self.acceptance != "lossless":
            raise ConfigError(
                f"acceptance={self.acceptance!r} is not supported; use 'lossless', which keeps the "
                "target model's output distribution"
            )
        for key in ("model", "revision"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{key}={value!r} must be a string")
        if self.revision is not None and self.model is None:
            raise ConfigError(
                f"revision={self.revision!r} in speculative_config is that of the heads, but no "
                "model is given there; name the heads' model, or leave revision out: heads in the "
                "target's own repository come with the target's revision"
            )
        for key in ("num_speculative_tokens", "max_tree_requests"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{key}={value!r} must be a positive integer")
        if not isinstance(self.tree, (str, Sequence)):
            raise ConfigError(
                f"tree={self.tree!r} must be 'auto', a tree's name, a tree file or a list of paths"
            )


@dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """The resolved configuration that every process of the engine reads.

    Attributes:
        heads: directory, file or hub name of the heads.
        revision: hub revision of the heads.
        tree: the draft tree.
        tree_name: how the tree was chosen, for messages.
        max_tree_requests: as in `MedusaRequest`.

    """

    heads: str
    revision: str | None
    tree: DraftTree
    tree_name: str
    max_tree_requests: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON; `from_dict` is the inverse."""
        return {
            "heads": self.heads,
            "revision": self.revision,
            "tree": [list(path) for path in self.tree.paths],
            "tree_name": self.tree_name,
            "max_tree_requests": self.max_tree_requests,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MedusaConfig:
        """Rebuild a configuration from `to_dict`."""
        return cls(**{**values, "tree": DraftTree.from_paths(values["tree"])})


def resolve_tree(
    request: MedusaRequest, num_heads: int, heads_tree: Sequence[Sequence[int]] | None
) -> tuple[DraftTree, str]:
    """Return the tree a request means, and how it was chosen.

    Args:
        request: what the user asked for.
        num_heads: how many heads the checkpoint holds.
        heads_tree: paths that came with the heads, the most probable first, if any.

    Raises:
        TreeError: if there is no such tree, or it needs more heads than there are.
        ConfigError: if ``num_speculative_tokens`` does not agree with the tree.

    """
    size = request.num_speculative_tokens
    if request.tree == "auto":
        return _auto_tree(size, num_heads, heads_tree)
    if request.tree == "chain" and size is not None and size <= num_heads:
        return DraftTree.chain(size), "chain"
    tree, name = _given_tree(request.tree, num_heads)
    tree.check_heads(num_heads)
    if size is not None and size != tree.num_draft_tokens:
        raise ConfigError(
            f"num_speculative_tokens={size} does not agree with the tree {name}, which has "
            f"{tree.num_draft_tokens} nodes; remove one of the two"
        )
    return tree, name


def _auto_tree(
    size: int | None, num_heads: int, heads_tree: Sequence[Sequence[int]] | None
) -> tuple[DraftTree, str]:
    ordered: Sequence[Sequence[int]]
    if heads_tree is not None:
        ordered, origin = heads_tree, "from the heads' checkpoint"
    else:
        # More than any size can ask for, so that a size too large is told from a tree too small.
        ordered, origin = named.default_paths(num_heads, 128), "default"
    count = named.DEFAULT_NUM_DRAFT_TOKENS if size is None else size
    if count > len(ordered) and size is not None:
        raise ConfigError(
            f"num_speculative_tokens={size} asks for more nodes than the {len(ordered)} of the "
            f"tree {origin}; ask for fewer or give a tree"
        )
    tree = DraftTree.from_paths(ordered[:count])
    tree.check_heads(num_heads)
    return tree, f"auto: {tree.num_draft_tokens} nodes {origin}"


def _given_tree(tree: str | Sequence[Sequence[int]], num_heads: int) -> tuple[DraftTree, str]:
    if not isinstance(tree, str):
        return DraftTree.from_paths(tree), "given as paths"
    path = os.path.expanduser(tree)
    is_file = tree.endswith(".json") or os.path.isfile(path)
    if is_file and tree not in named.tree_names():
        return DraftTree.from_paths(read_tree_file(Path(path))), tree
    return named.named_tree(tree, num_heads), tree


__all__ = [
    "CONFIG_KEY",
    "ConfigError",
    "MedusaConfig",
    "MedusaRequest",
    "TreeError",
    "TreePath",
    "resolve_tree",
]
