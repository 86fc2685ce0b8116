"""Constant tensors of one draft tree, made once and used at every step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vllm_medusa.tree.draft_tree import DraftTree


@dataclass(frozen=True)
class TreeLayout:
    """Constant tensors of a tree with N draft nodes, P fork paths and depth D.

    Every prefix of the nodes is a tree, so one layout also serves the steps in which a request
    runs only the first ``n`` drafts: those are nodes ``0..n``, their fork paths the first ones of
    the full tree, the last of them cut short.

    A *fork path* is a way from the root whose last nodes are consecutive, each the child of the
    one before, and are on no earlier fork path. In depth-first order these are the leaf paths. In
    a tree of stages a path may also end where a later stage goes on.

    Attributes:
        tree: the tree itself.
        depths: [N + 1] int64, depth of each node; the root's is 0.
        parents: [N + 1] int64, parent of each node; the root is its own.
        ancestors: [N + 1, D + 1] int64, the node at each depth on the way from the root to the
            node; the node itself where the depth exceeds its own.
        ranks: [N] int64, rank of each draft node among its head's guesses.
        heads: [N] int64, head that guesses each draft node (its depth - 1).
        depth_first: [N + 1] int64, the nodes in depth-first order.
        node_path: [N + 1] int64, first fork path that goes through each node.
        path_starts: first node each fork path adds to those before.
        path_ends: its last node; what it adds is ``path_starts[j]..path_ends[j]``.

    """

    tree: DraftTree
    depths: Tensor
    parents: Tensor
    ancestors: Tensor
    ranks: Tensor
    heads: Tensor
    depth_first: Tensor
    node_path: Tensor
    path_starts: tuple[int, ...]
    path_ends: tuple[int, ...]

    @classmethod
    def build(cls, tree: DraftTree, device: torch.device | str = "cpu") -> TreeLayout:
        """Compute the tensors of ``tree`` on ``device``."""
        parents = tree.parents
        depths = [0, *(len(path) for path in tree.paths)]
        nodes = range(len(parents))
        starts = [0, *(node for node in nodes[1:] if parents[node] != node - 1)]
        ends = [start - 1 for start in starts[1:]] + [nodes[-1]]
        node_path = [
            path
            for path, (start, end) in enumerate(zip(starts, ends, strict=True))
            for _ in range(start, end + 1)
        ]

        def as_tensor(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return cls(
            tree=tree,
            depths=as_tensor(depths),
            parents=as_tensor([0, *parents[1:]]),
            ancestors=as_tensor(_ancestors(parents, depths, tree.depth)),
            ranks=as_tensor([path[-1] for path in tree.paths]),
            heads=as_tensor([len(path) - 1 for path in tree.paths]),
            depth_first=as_tensor([0, *tree.depth_first]),
            node_path=as_tensor(node_path),
            path_starts=tuple(starts),
            path_ends=tuple(ends),
        )

    @property
    def num_nodes(self) -> int:
        """Number of nodes, the root included."""
        return self.tree.num_draft_tokens + 1

    @property
    def num_paths(self) -> int:
        """Number of fork paths."""
        return len(self.path_ends)

    @property
    def depth(self) -> int:
        """Depth of the deepest node."""
        return self.tree.depth

    @property
    def first_path_length(self) -> int:
        """Number of draft nodes on the first fork path, which are the nodes ``1..length``."""
        return self.path_ends[0]

    @cached_property
    def depth_first_depths(self) -> Tensor:
        """[N + 1] int64, depth of each node, in depth-first order."""
        return self.depths[self.depth_first]

    @cached_property
    def depth_first_ancestors(self) -> Tensor:
        """[N + 1, D + 1] int64, ancestors of each node, in depth-first order."""
        return self.ancestors[self.depth_first]

    def num_live_paths(self, num_draft_tokens: int) -> int:
        """Return how many fork paths the tree of the first ``num_draft_tokens`` nodes has."""
        return sum(start <= num_draft_tokens for start in self.path_starts)

    def draft_tokens(self, topk: Tensor) -> Tensor:
        """Place the heads' guesses on the tree.

        A node's token depends on its depth and rank alone, not on its ancestors (paper, section
        2.1.2).

        Args:
            topk: [num_heads, B, K] guesses of each head, the best first, with ``num_heads >= D``
                and ``K >= tree.top_k``.

        Returns:
            [B, N] token of each draft node.

        """
        return topk[self.heads, :, self.ranks].T


def _ancestors(parents: tuple[int, ...], depths: list[int], max_depth: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for node, parent in enumerate(parents):
        above = rows[parent][: depths[parent] + 1] if parent >= 0 else []
        rows.append([*above, *[node] * (max_depth + 1 - len(above))])
    return rows
