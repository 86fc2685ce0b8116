"""From the tree that a user asks for to a tree, a schedule, or the limits of dynamic trees."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_medusa.config.options import MedusaOptions
from vllm_medusa.config.resolved import SizesByBatch
from vllm_medusa.errors import UserError, shown
from vllm_medusa.tree import named
from vllm_medusa.tree.draft_tree import MAX_DRAFT_TOKENS, DraftTree, read_tree_file
from vllm_medusa.tree.limits import DynamicTrees
from vllm_medusa.tree.named import AUTO, STATIC
from vllm_medusa.tree.schedule import TreeSchedule


@dataclass(frozen=True)
class TreeChoice:
    """The tree that the user asked for; the attributes are those of `MedusaConfig`."""

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
    """Return the tree that the user asked for.

    Args:
        request: the options that the user gave.
        num_heads: number of heads of the checkpoint.
        heads_tree: paths that came with the heads, the most probable first, if any.
        heads_schedule: trees by batch size that came with the heads, if any.

    Raises:
        UserError: if there is no such tree, if it needs more heads than there are, or if
            ``num_speculative_tokens`` does not agree with it.

    """
    size, by_batch = request.num_speculative_tokens, request.num_speculative_tokens_per_batch_size
    is_best = request.tree in (AUTO, STATIC)
    if request.is_dynamic:
        return _dynamic_trees(request, num_heads, heads_tree)
    if by_batch is not None:
        choice = _sized_by_batch(request, by_batch, num_heads, heads_tree)
    elif is_best and size is None and heads_schedule is not None:
        tree, sizes = heads_schedule.tree(), tuple(heads_schedule.sizes())
        choice = TreeChoice(tree, "static: the heads' tree schedule", sizes)
    elif is_best:
        choice = _best_tree(size, num_heads, heads_tree)
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
    if request.tree in (AUTO, STATIC):
        name, stages = STATIC, [_best_tree(count, num_heads, heads_tree).tree for count in counts]
    elif request.tree == "chain":
        name, stages = "chain", [DraftTree.chain(count) for count in counts]
    else:
        raise UserError(
            f"num_speculative_tokens_per_batch_size={shown([list(size) for size in sizes])} needs "
            f"tree='static' or 'chain', not {shown(request.tree)}, whose nodes cannot be cut "
            "to a size"
        )
    tree = DraftTree.from_stages(stage.paths for stage in stages)
    return TreeChoice(tree, f"{name}, {counts} nodes by batch size", sizes)


def _dynamic_trees(
    request: MedusaOptions, num_heads: int, heads_tree: Sequence[Sequence[int]] | None
) -> TreeChoice:
    paths = heads_tree or named.default_paths(num_heads, MAX_DRAFT_TOKENS)
    tree = DraftTree.from_paths(paths[:MAX_DRAFT_TOKENS])
    tree.check_heads(num_heads)
    dynamic = DynamicTrees.from_dict(request.dynamic_values)
    sources = " and ".join((*dynamic.sources, *["shared text"] * dynamic.shared_text))
    name = f"dynamic, up to {dynamic.max_nodes} nodes of {sources}"
    return TreeChoice(tree, name, dynamic=dynamic)


def _best_tree(
    size: int | None, num_heads: int, heads_tree: Sequence[Sequence[int]] | None
) -> TreeChoice:
    ordered: Sequence[Sequence[int]]
    if heads_tree is not None:
        ordered, origin = heads_tree, "from the heads' checkpoint"
    else:
        # More nodes than any size, so that a size that is too large gets the right error.
        ordered, origin = named.default_paths(num_heads, 128), "default"
    count = named.DEFAULT_NUM_DRAFT_TOKENS if size is None else size
    if count > len(ordered) and size is not None:
        raise UserError(
            f"num_speculative_tokens={size} asks for more nodes than the {len(ordered)} of the "
            f"tree {origin}; ask for fewer or give a tree"
        )
    tree = DraftTree.from_paths(ordered[:count])
    return TreeChoice(tree, f"static: {tree.num_draft_tokens} nodes {origin}")


def _given_tree(tree: str | Sequence[Sequence[int]], num_heads: int) -> tuple[DraftTree, str]:
    if not isinstance(tree, str):
        return DraftTree.from_paths(tree), "given as paths"
    path = os.path.expanduser(tree)
    is_file = tree.endswith(".json") or os.path.isfile(path)
    if is_file and tree not in named.tree_names():
        return DraftTree.from_paths(read_tree_file(Path(path))), tree
    return named.named_tree(tree, num_heads), tree
