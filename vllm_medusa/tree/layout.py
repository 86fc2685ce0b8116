"""Constant tensors of one static tree, made once and used whenever heads draft it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.step_trees import path_starts


@dataclass(frozen=True)
class Level:
    """The n draft nodes of one depth, and the m nodes that they hang below.

    Attributes:
        nodes: [n] int64.
        parents: [m] int64, each once; 0 is the root.
        parent_places: [n] int64, place of each node's parent among these.
        ranks: [n] int64, rank of each node among its parent's guesses.

    """

    nodes: Tensor
    parents: Tensor
    parent_places: Tensor
    ranks: Tensor


def levels_of(parents: Tensor, ranks: Tensor) -> tuple[Level, ...]:
    """Return the nodes of a tree by depth, from 1.

    Args:
        parents: [N] int64, parent of each draft node, which comes before it; 0 is the root.
        ranks: [N] int64.

    """
    levels = []
    above = torch.zeros(1, dtype=torch.int64, device=parents.device)
    while len(places := torch.isin(parents, above).nonzero().flatten()):
        found, parent_places = torch.unique(parents[places], return_inverse=True)
        levels.append(Level(places + 1, found, parent_places, ranks[places]))
        above = places + 1
    return tuple(levels)


@dataclass(frozen=True)
class TreeLayout:
    """A tree of N draft nodes.

    Attributes:
        parents: parent of each draft node; 0 is the root.
        path_starts: nodes at which its fork paths start (`step_trees.path_starts`).
        ranks: [N] int64, rank of each draft node among its head's guesses.
        heads: [N] int64, head that guesses each draft node (its depth - 1).

    """

    parents: tuple[int, ...]
    path_starts: tuple[int, ...]
    ranks: Tensor
    heads: Tensor

    @classmethod
    def build(cls, tree: DraftTree, device: torch.device | str = "cpu") -> TreeLayout:
        """Compute the tensors of ``tree`` on ``device``."""
        parents = tree.parents[1:]
        return cls(
            parents=parents,
            path_starts=tuple(path_starts(parents)),
            ranks=torch.tensor([path[-1] for path in tree.paths], device=device),
            heads=torch.tensor([len(path) - 1 for path in tree.paths], device=device),
        )

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The nodes by depth, from 1."""
        return levels_of(torch.tensor(self.parents, device=self.ranks.device), self.ranks)

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
