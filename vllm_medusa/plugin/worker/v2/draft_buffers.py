"""What the heads read and write, at addresses that stay, because CUDA graphs replay them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftBuffers:
    """A row for each of up to R requests; a step uses the first ones.

    Attributes:
        hidden_states: [R, H] target's final hidden state at the last accepted token.
        roots: [R] int64, the token after it.
        places: [R] int64, for heads with prefix attention: each request's place in its memory.
        positions: [R] int64, position of the last accepted token, for the same.
        tokens: [R, N] int64, drafts of the usual trees.
        parents: [R, N + 1] int64, of best-first trees; of static ones not used.
        fixed_tokens: [R, nodes] int64, beside best-first trees the drafts of the static one.

    """

    hidden_states: Tensor
    roots: Tensor
    places: Tensor
    positions: Tensor
    tokens: Tensor
    parents: Tensor
    fixed_tokens: Tensor

    @classmethod
    def make(
        cls,
        num_reqs: int,
        hidden_size: int,
        num_nodes: int,
        num_fixed_nodes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> DraftBuffers:
        """Allocate for as many requests; the sizes are those of the attributes."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            hidden_states=zeros(num_reqs, hidden_size, dtype=dtype),
            roots=zeros(num_reqs),
            places=zeros(num_reqs),
            positions=zeros(num_reqs),
            tokens=zeros(num_reqs, num_nodes),
            parents=zeros(num_reqs, num_nodes + 1),
            fixed_tokens=zeros(num_reqs, num_fixed_nodes),
        )

    def read(self, hidden_states: Tensor, rows: Tensor, last_sampled: Tensor, index: Tensor) -> int:
        """Copy a step's hidden states and roots.

        Args:
            hidden_states: [T, H] of all tokens of the step.
            rows: [B] the token of each request that the drafts follow.
            last_sampled: the token that each state index's request sampled last.
            index: [B] state index of each request.

        Returns:
            B.

        """
        num_reqs = len(index)
        torch.index_select(hidden_states, 0, rows, out=self.hidden_states[:num_reqs])
        self.roots[:num_reqs] = last_sampled.flatten()[index]
        return num_reqs
