"""Slow, obvious oracles of the tree maths, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_medusa.tree.draft_tree import DraftTree, TreePath


def walk(
    tree: DraftTree, target_tokens: Sequence[int], draft_tokens: Sequence[int]
) -> tuple[int, list[int]]:
    """Walk one request's tree node by node, as the rule of lossless acceptance is told.

    Args:
        tree: the full tree.
        target_tokens: token taken from the target at each node, the root first.
        draft_tokens: tokens of the verified draft nodes, the first ones of the tree.

    Returns:
        The last accepted node and the emitted tokens.

    """
    node: TreePath = ()
    index = {path: i for i, path in enumerate([(), *tree.paths])}
    emitted = []
    while True:
        token = target_tokens[index[node]]
        emitted.append(token)
        children = [
            path
            for path in tree.paths[: len(draft_tokens)]
            if path[:-1] == node and draft_tokens[index[path] - 1] == token
        ]
        if not children:
            return index[node], emitted
        node = min(children, key=index.__getitem__)


def ancestor_tokens(tree: DraftTree, tokens: Sequence[int], node: int) -> list[int]:
    """Return the tokens from the root to ``node``; ``tokens`` has one per node."""
    path = ([(), *tree.paths])[node]
    index = {path: i for i, path in enumerate([(), *tree.paths])}
    return [tokens[index[path[:depth]]] for depth in range(len(path) + 1)]


class ReferenceCache:
    """A paged cache whose slots hold tokens, to check fork index arithmetic against.

    Args:
        num_blocks: blocks of the cache.
        block_size: tokens of a block.

    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.slots: list[object] = [None] * (num_blocks * block_size)

    def write(self, values: Sequence[object], slots: Sequence[int]) -> None:
        """Write each value to its slot; negative slots are skipped."""
        for value, slot in zip(values, slots, strict=True):
            if slot >= 0:
                self.slots[slot] = value

    def copy_blocks(self, source: Sequence[int], destination: Sequence[int]) -> None:
        """Copy whole blocks."""
        size = self.block_size
        for src, dst in zip(source, destination, strict=True):
            self.slots[dst * size : (dst + 1) * size] = self.slots[src * size : (src + 1) * size]

    def read(self, block_table: Sequence[int], length: int) -> list[object]:
        """Read the first ``length`` tokens of a sequence."""
        size = self.block_size
        return [self.slots[block_table[i // size] * size + i % size] for i in range(length)]


def random_subtree(
    choose: Callable[[int], int], num_nodes: int, max_depth: int, max_rank: int
) -> DraftTree:
    """Grow a tree of up to ``num_nodes`` drafts; ``choose(n)`` picks one of ``range(n)``."""
    paths: list[TreePath] = [(0,)]
    for _ in range(20 * num_nodes):
        if len(paths) >= num_nodes:
            break
        parent = ([(), *paths])[choose(len(paths) + 1)]
        path = (*parent, choose(max_rank + 1))
        if len(path) <= max_depth and path not in paths:
            paths.append(path)
    return DraftTree.from_paths(paths)


def random_order(choose: Callable[[int], int], tree: DraftTree) -> list[TreePath]:
    """Return the paths in a random order with parents before children, so that prefixes are trees.

    ``choose(n)`` picks one of ``range(n)``.
    """
    order: list[TreePath] = []
    while len(order) < tree.num_draft_tokens:
        known = {(), *order}
        ready = [path for path in tree.paths if path not in known and path[:-1] in known]
        order.append(ready[choose(len(ready))])
    return order
