"""The plugin's configuration: what a user may write, checked, and what travels to every process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_medusa.errors import UserError, shown
from vllm_medusa.tree import named
from vllm_medusa.tree.draft_tree import MAX_DRAFT_TOKENS, DraftTree, read_tree_file
from vllm_medusa.tree.limits import DYNAMIC, SOURCES, DynamicTrees, TreeLimits
from vllm_medusa.tree.schedule import TreeSchedule
from vllm_medusa.tree.step_trees import path_starts

#: Key of `MedusaConfig.to_dict` in vLLM's ``additional_config``.
CONFIG_KEY = "medusa"

#: vLLM's ``num_speculative_tokens_per_batch_size``: first batch size, last one, draft nodes.
SizesByBatch = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class MedusaOptions:
    """What the user asked for in vLLM's ``speculative_config``.

    Attributes:
        model: directory, file or hub name of the heads; None: the target model's own directory.
        revision: hub revision of the heads.
        tree: ``"auto"``, a named tree, the path of a tree file, or a list of paths.
        num_speculative_tokens: number of draft nodes; must agree with a tree that is given.
        num_speculative_tokens_per_batch_size: number of draft nodes by batch size, as vLLM's key
            of that name: ``[[first, last, nodes], ...]``; 0 nodes: nothing is drafted.
        acceptance: ``"lossless"`` is the only rule so far.
        max_tree_requests: how many requests may hold fork blocks at once; None: as many as an
            eighth of the KV cache allows. Requests beyond them draft a chain.
        max_nodes, max_depth, sources, learn: of ``tree="dynamic"`` only, as in `DynamicTrees`.

    """

    model: str | None = None
    revision: str | None = None
    tree: str | Sequence[Sequence[int]] = "auto"
    num_speculative_tokens: int | None = None
    num_speculative_tokens_per_batch_size: Sequence[Sequence[int]] | None = None
    acceptance: str = "lossless"
    max_tree_requests: int | None = None
    max_nodes: int | None = None
    max_depth: int | None = None
    sources: Sequence[str] | None = None
    learn: bool | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MedusaOptions:
        """Check the values of a ``speculative_config`` whose method is ``medusa``.

        Raises:
            UserError: if a key is not known or a value is not allowed.

        """
        given = {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value
            for key, value in with_underscores(values).items()
            if key != "method" and value is not None
        }
        for key in given:
            if key not in _keys():
                raise UserError(
                    f"speculative_config has {shown(key)}, which method 'medusa' does not know; "
                    f"use {', '.join(_keys())}"
                )
        request = cls(**given)
        request._check()
        return request

    def _check(self) -> None:
        if not isinstance(self.acceptance, str) or self.acceptance != "lossless":
            raise UserError(
                f"acceptance={shown(self.acceptance)} is not supported; use 'lossless', which "
                "keeps the target model's output distribution"
            )
        for key in ("model", "revision"):
            value = getattr(self, key)
            if value is not None and not isinstance(value, str):
                raise UserError(f"{key}={shown(value)} must be a string")
        if self.revision is not None and self.model is None:
            raise UserError(
                f"revision={shown(self.revision)} in speculative_config is that of the heads, but "
                "no model is given there; name the heads' model, or leave revision out: heads in "
                "the target's own repository come with the target's revision"
            )
        self._check_dynamic()
        for key in ("num_speculative_tokens", "max_tree_requests", "max_nodes", "max_depth"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"{key}={shown(value)} must be a positive integer")
        if self.max_nodes is not None and self.max_nodes > MAX_DRAFT_TOKENS:
            raise UserError(
                f"max_nodes={self.max_nodes} is over the {MAX_DRAFT_TOKENS} draft tokens that vLLM "
                "verifies in a step; lower it"
            )
        if self.num_speculative_tokens_per_batch_size is not None:
            _check_sizes(self.num_speculative_tokens_per_batch_size)
        if not isinstance(self.tree, (str, Sequence)):
            raise UserError(
                f"tree={shown(self.tree)} must be 'auto', a tree's name, a tree file or a list of "
                "paths"
            )

    @property
    def is_dynamic(self) -> bool:
        """Whether the trees are dynamic."""
        # The tree may be of any type as long as it is not checked.
        return isinstance(self.tree, str) and self.tree == DYNAMIC

    def _check_dynamic(self) -> None:
        """Check the keys that dynamic trees have and static ones do not."""
        for key in ("max_nodes", "max_depth", "sources", "learn"):
            if getattr(self, key) is not None and not self.is_dynamic:
                raise UserError(
                    f"{key}={shown(getattr(self, key))} bounds dynamic trees, but the tree is "
                    f"{shown(self.tree)}; use tree='dynamic' or leave {key} out"
                )
        if self.is_dynamic and (
            self.num_speculative_tokens is not None
            or self.num_speculative_tokens_per_batch_size is not None
        ):
            raise UserError(
                "num_speculative_tokens sizes static trees, but the tree is 'dynamic'; bound it "
                "with max_nodes"
            )
        if self.learn is not None and not isinstance(self.learn, bool):
            raise UserError(f"learn={shown(self.learn)} must be true or false")
        sources = self.sources
        if sources is not None and (
            not isinstance(sources, (list, tuple))
            or not sources
            or not all(isinstance(name, str) and name in SOURCES for name in sources)
        ):
            raise UserError(
                f"sources={shown(sources)} must be a list of some of "
                f"{', '.join(map(repr, SOURCES))}"
            )


def with_underscores(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a ``speculative_config`` with ``a_key`` for ``a-key``.

    Raises:
        UserError: if a key is no string, or is given in both spellings.

    """
    spelled: dict[str, str] = {}
    for key in values:
        if not isinstance(key, str):
            raise UserError(
                f"speculative_config has the key {shown(key)}, which is no string; "
                f"use {', '.join(_keys())}"
            )
        name = key.replace("-", "_")
        if name in spelled:
            raise UserError(
                f"speculative_config has {shown(spelled[name])} and {shown(key)}, which are one "
                "key; remove one of them"
            )
        spelled[name] = key
    return {name: values[key] for name, key in spelled.items()}


def _keys() -> list[str]:
    return [field.name for field in dataclasses.fields(MedusaOptions)]


@dataclass(frozen=True, kw_only=True)
class MedusaConfig:
    """The resolved configuration that every process of the engine reads.

    Attributes:
        heads: directory, file or hub name of the heads.
        revision: hub revision of the heads.
        tree: the draft tree; with trees by batch size the largest, the others its first nodes;
            with dynamic trees the rank paths that the heads' nodes are chosen from.
        tree_name: how the tree was chosen, for messages.
        sizes_by_batch: how many of its nodes are drafted at which batch size; None: always all.
        max_tree_requests: as in `MedusaOptions`.
        dynamic: bounds of the trees if they are dynamic.

    """

    heads: str
    revision: str | None
    tree: DraftTree
    tree_name: str
    sizes_by_batch: SizesByBatch | None = None
    max_tree_requests: int | None = None
    dynamic: DynamicTrees | None = None

    @property
    def limits(self) -> TreeLimits:
        """What no draft tree exceeds."""
        if self.dynamic is not None:
            nodes, depth = self.dynamic.max_nodes, self.dynamic.max_depth
            return TreeLimits(nodes, min(depth, nodes), min(self.dynamic.max_paths, nodes))
        tree = self.tree
        return TreeLimits(tree.num_draft_tokens, tree.depth, len(path_starts(tree.parents[1:])))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON; `from_dict` is the inverse."""
        return {
            "heads": self.heads,
            "revision": self.revision,
            "tree": [list(path) for path in self.tree.paths],
            "tree_name": self.tree_name,
            "sizes_by_batch": self.sizes_by_batch and [list(s) for s in self.sizes_by_batch],
            "max_tree_requests": self.max_tree_requests,
            "dynamic": self.dynamic and dataclasses.asdict(self.dynamic),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MedusaConfig:
        """Rebuild a configuration from `to_dict`."""
        sizes, dynamic = values["sizes_by_batch"], values["dynamic"]
        return cls(
            heads=values["heads"],
            revision=values["revision"],
            tree=DraftTree(tuple(tuple(path) for path in values["tree"])),
            tree_name=values["tree_name"],
            sizes_by_batch=sizes and tuple(tuple(size) for size in sizes),
            max_tree_requests=values["max_tree_requests"],
            dynamic=dynamic and DynamicTrees(**{**dynamic, "sources": tuple(dynamic["sources"])}),
        )


@dataclass(frozen=True)
class TreeChoice:
    """The tree that a request means; the attributes are those of `MedusaConfig`."""

    tree: DraftTree
    tree_name: str
    sizes_by_batch: SizesByBatch | None = None
    dynamic: DynamicTrees | None = None


def resolve_tree(
    request: MedusaOptions,
    num_heads: int,
    heads_tree: Sequence[Sequence[int]] | None,
    heads_schedule: TreeSchedule | None = None,
) -> TreeChoice:
    """Return the tree a request means.

    Args:
        request: what the user asked for.
        num_heads: how many heads the checkpoint holds.
        heads_tree: paths that came with the heads, the most probable first, if any.
        heads_schedule: trees by batch size that came with the heads, if any.

    Raises:
        UserError: if there is no such tree, or it needs more heads than there are.
        UserError: if ``num_speculative_tokens`` does not agree with the tree.

    """
    size, by_batch = request.num_speculative_tokens, request.num_speculative_tokens_per_batch_size
    if request.is_dynamic:
        return _dynamic_trees(request, num_heads, heads_tree)
    if by_batch is not None:
        choice = _sized_by_batch(request, by_batch, num_heads, heads_tree)
    elif request.tree == "auto" and size is None and heads_schedule is not None:
        tree, sizes = heads_schedule.tree(), tuple(heads_schedule.sizes())
        choice = TreeChoice(tree, "auto: the heads' tree schedule", sizes)
    elif request.tree == "auto":
        choice = _auto_tree(size, num_heads, heads_tree)
    elif request.tree == "chain" and size is not None and size <= num_heads:
        choice = TreeChoice(DraftTree.chain(size), "chain")
    else:
        choice = TreeChoice(*_given_tree(request.tree, num_heads))
    choice.tree.check_heads(num_heads)
    if size is not None and size != choice.tree.num_draft_tokens:
        raise UserError(
            f"num_speculative_tokens={size} does not agree with the tree {choice.tree_name}, which "
            f"has {choice.tree.num_draft_tokens} nodes; remove one of the two"
        )
    return choice


def _sized_by_batch(
    request: MedusaOptions,
    by_batch: Sequence[Sequence[int]],
    num_heads: int,
    heads_tree: Sequence[Sequence[int]] | None,
) -> TreeChoice:
    sizes = tuple((first, last, nodes) for first, last, nodes in by_batch)
    counts = sorted({nodes for _, _, nodes in sizes if nodes})
    if request.tree == "auto":
        stages = [_auto_tree(count, num_heads, heads_tree).tree for count in counts]
    elif request.tree == "chain":
        stages = [DraftTree.chain(count) for count in counts]
    else:
        raise UserError(
            f"num_speculative_tokens_per_batch_size={shown([list(size) for size in sizes])} needs "
            f"tree='auto' or 'chain', not {shown(request.tree)}, which has no order to cut its "
            "nodes by"
        )
    tree = DraftTree.from_stages(stage.paths for stage in stages)
    return TreeChoice(tree, f"{request.tree}, {counts} nodes by batch size", sizes)


def _dynamic_trees(
    request: MedusaOptions, num_heads: int, heads_tree: Sequence[Sequence[int]] | None
) -> TreeChoice:
    paths = heads_tree or named.default_paths(num_heads, MAX_DRAFT_TOKENS)
    tree = DraftTree.from_paths(paths[:MAX_DRAFT_TOKENS])
    tree.check_heads(num_heads)
    keys = ("max_nodes", "max_depth", "sources", "learn")
    given = {key: getattr(request, key) for key in keys if getattr(request, key) is not None}
    if "sources" in given:
        given["sources"] = tuple(given["sources"])
    dynamic = DynamicTrees(**given)
    name = f"dynamic, up to {dynamic.max_nodes} nodes of {' and '.join(dynamic.sources)}"
    return TreeChoice(tree, name, dynamic=dynamic)


def _auto_tree(
    size: int | None, num_heads: int, heads_tree: Sequence[Sequence[int]] | None
) -> TreeChoice:
    ordered: Sequence[Sequence[int]]
    if heads_tree is not None:
        ordered, origin = heads_tree, "from the heads' checkpoint"
    else:
        # More than any size can ask for, so that a size too large is told from a tree too small.
        ordered, origin = named.default_paths(num_heads, 128), "default"
    count = named.DEFAULT_NUM_DRAFT_TOKENS if size is None else size
    if count > len(ordered) and size is not None:
        raise UserError(
            f"num_speculative_tokens={size} asks for more nodes than the {len(ordered)} of the "
            f"tree {origin}; ask for fewer or give a tree"
        )
    tree = DraftTree.from_paths(ordered[:count])
    return TreeChoice(tree, f"auto: {tree.num_draft_tokens} nodes {origin}")


def _given_tree(tree: str | Sequence[Sequence[int]], num_heads: int) -> tuple[DraftTree, str]:
    if not isinstance(tree, str):
        return DraftTree.from_paths(tree), "given as paths"
    path = os.path.expanduser(tree)
    is_file = tree.endswith(".json") or os.path.isfile(path)
    if is_file and tree not in named.tree_names():
        return DraftTree.from_paths(read_tree_file(Path(path))), tree
    return named.named_tree(tree, num_heads), tree


def _check_sizes(sizes: Any) -> None:
    """Check ``num_speculative_tokens_per_batch_size`` as vLLM does (``v1/spec_decode/dynamic``)."""
    before, largest = 0, 0
    for size in sizes if isinstance(sizes, (list, tuple)) else [sizes]:
        if (
            not isinstance(size, (list, tuple))
            or len(size) != 3
            or any(type(number) is not int for number in size)
            or not (size[1] >= size[0] > before and size[2] >= 0)
            or (not before and size[0] != 1)
        ):
            raise UserError(
                f"num_speculative_tokens_per_batch_size has {shown(size)}; use [first batch size, "
                "last batch size, draft nodes] in rising order from batch size 1, "
                "such as [[1, 4, 16], [5, 64, 4]]"
            )
        before, largest = size[1], max(largest, size[2])
    if not largest:
        raise UserError(
            f"num_speculative_tokens_per_batch_size={shown(sizes)} drafts nothing at any batch "
            "size; leave speculative_config out instead"
        )
