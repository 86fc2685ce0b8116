"""The data of the trees: one part for each request, one for each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_medusa.kernels import NO_TREE, trees


@dataclass(frozen=True)
class TreeStates:
    """The trees that requests run in their next step, by request-state index.

    The speculator writes them together with a request's draft tokens, so every request can
    have a new tree in each step. Between steps nothing of a tree remains in the KV cache.

    Attributes:
        parents: [R, N + 1] int64, parent of each node; the root's is 0.
        depths: [R, N + 1] int64.
        ancestors: [R, N + 1] int64, bit ``j``: node ``j`` is on the way from the root to the node,
            or the node itself.

    """

    parents: Tensor
    depths: Tensor
    ancestors: Tensor

    @classmethod
    def make(cls, max_num_reqs: int, num_nodes: int, device: torch.device) -> TreeStates:
        """Allocate for as many requests, of ``num_nodes`` nodes with the root."""

        def zeros() -> Tensor:
            return torch.zeros(max_num_reqs, num_nodes, dtype=torch.int64, device=device)

        return cls(zeros(), zeros(), zeros())

    def set_trees(self, parents: Tensor, idx_mapping: Tensor) -> None:
        """Give requests their next trees (`trees.set_trees`).

        Args:
            parents: [B, N + 1] parent of each node.
            idx_mapping: [B] state index of each request.

        """
        trees.set_trees(self.parents, self.depths, self.ancestors, parents, idx_mapping)


@dataclass
class TreeBuffers:
    """The tree data of a step that attention reads; persistent, because CUDA graphs read it.

    Attributes:
        positions: [T] int64, the runner's own buffer; for a tree's token base plus depth.
        ancestors: [T] int64, masks of the tokens in trees.
        base: [B] int32, position of each request's root, or `NO_TREE`.
        context_lens: [B] int32, keys before each request's queries.
        num_tree_reqs: number of requests, from the first of the batch, that can have a tree in this
            step. On the host; None: all can, as when a CUDA graph is captured.

    """

    positions: Tensor
    ancestors: Tensor
    base: Tensor
    context_lens: Tensor
    num_tree_reqs: int | None = None

    @classmethod
    def make(cls, positions: Tensor, max_num_reqs: int) -> TreeBuffers:
        """Allocate around the runner's buffer of positions."""
        device = positions.device
        return cls(
            positions=positions,
            ancestors=torch.zeros_like(positions, dtype=torch.int64),
            base=torch.full((max_num_reqs,), NO_TREE, dtype=torch.int32, device=device),
            context_lens=torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
        )

    def forget(self) -> None:
        """Remove all trees, for vLLM's dummy steps: profiling, warm-up and capture."""
        self.base.fill_(NO_TREE)
        self.context_lens.zero_()
        self.num_tree_reqs = None
