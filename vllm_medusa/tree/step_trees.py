"""The draft trees of one step as arrays: each request can have a new tree in each step.

A tree is given by the parents of its draft nodes. Node 0 is the root, the last sampled token, and
the parent of a node always comes before it. So every prefix of the nodes is a tree too: when the
scheduler cuts a request's drafts to fit a budget, what is left is still valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class StepTrees:
    """The trees of B requests, of at most N draft nodes and of depth D at most.

    Entries of nodes that a request does not run are in range but have no meaning.

    Attributes:
        num_drafts: [B] draft nodes of each request.
        parents: [B, N + 1] parent of each node; the root is its own.
        depths: [B, N + 1] depth of each node; the root's is 0.
        ancestors: [B, N + 1, D + 1] the node at each depth on the way from the root to the node;
            the node itself where the depth exceeds its own.

    """

    num_drafts: IntArray
    parents: IntArray
    depths: IntArray
    ancestors: IntArray

    @classmethod
    def build(cls, parents: Sequence[Sequence[int]]) -> StepTrees:
        """Compute the arrays.

        Args:
            parents: for each request the parents of its draft nodes 1, 2, ...; none for a request
                that verifies no drafts.

        """
        counts = np.array([len(row) for row in parents], dtype=np.int64)
        table = np.zeros((len(counts), int(counts.max(initial=0)) + 1), dtype=np.int64)
        for row, given in zip(table, parents, strict=True):
            row[1 : len(given) + 1] = given
        ups = _ways_up(table)
        depths = (ups[:-1] > 0).sum(axis=0)
        steps_up = np.maximum(depths[..., None] - np.arange(len(ups)), 0)
        requests = np.arange(len(counts))[:, None, None]
        nodes = np.arange(table.shape[1])[None, :, None]
        return cls(counts, table, depths, ups[steps_up, requests, nodes])

    @property
    def depth(self) -> int:
        """Depth of the deepest node of any request."""
        return int(self.ancestors.shape[2]) - 1

    @property
    def num_requests(self) -> int:
        """Number of requests."""
        return len(self.num_drafts)

    def first_path_lengths(self) -> list[int]:
        """Return how many draft nodes each request has on its first fork path."""
        nodes = np.arange(self.parents.shape[1] - 1)
        goes_on = (self.parents[:, 1:] == nodes) & (nodes < self.num_drafts[:, None])
        lengths: list[int] = goes_on.cumprod(axis=1).sum(axis=1).tolist()
        return lengths


def _ways_up(parents: IntArray) -> IntArray:
    """[D + 1, B, N + 1]: each node, its parent, its parent's parent, ..., up to the root."""
    num_requests, width = parents.shape
    starts = np.arange(num_requests)[:, None] * width
    node = np.broadcast_to(np.arange(width), parents.shape)
    ways = [node]
    while node.any():
        node = parents.take(starts + node)
        ways.append(node)
    return np.stack(ways)


def path_starts(parents: Sequence[int]) -> list[int]:
    """Return the nodes at which a tree's *fork paths* start, the root first.

    A fork path is a run of consecutive nodes, each the child of the one before. Nodes in
    depth-first order have one fork path for each leaf.
    """
    return [0, *(node for node, parent in enumerate(parents, start=1) if parent != node - 1)]
