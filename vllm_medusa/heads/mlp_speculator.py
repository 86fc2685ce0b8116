"""MLP speculators (arXiv 2404.19124): heads that run in turn, each from the last one's state.

The state after a token is ``GELU(LN(P s + a E[token]))``, where s is the state before it and E a
table of the head's own; the lm_head reads the state. The first s is the target's hidden state.
Facts about the format and the constant a are from vLLM 0.32 (`models/mlp_speculator.py`) and IBM's
fms-extras, whose speculators these are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6


class MlpSpeculator(nn.Module):
    """The layers of an MLP speculator before its lm_heads (see `sequential.SequentialHeads`).

    Args:
        tensors: canonical ones (`HeadsCheckpoint`); heads without a tensor of their own share that
            of the last head before them that has one.
        num_heads: heads that draft.
        num_trained: K, heads that were trained together, on which the constant a depends.
        scales_input: whether the target's hidden state is normalised and divided by the square root
            of two.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        num_heads: int,
        num_trained: int,
        *,
        scales_input: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, nn.Parameter] = {}

        def parameters(part: str) -> nn.ParameterList:
            rows = []
            for head in range(num_heads):
                names = [f"speculator.{k}.{part}" for k in range(head, -1, -1)]
                name = next(name for name in names if name in tensors)
                if name not in made:
                    made[name] = nn.Parameter(tensors[name].to(device, dtype))
                rows.append(made[name])
            return nn.ParameterList(rows)

        self.embedding, self.weight = parameters("embedding"), parameters("weight")
        self.scale, self.bias = parameters("scale"), parameters("bias")
        self._scales_input = scales_input
        kept = 0.5 ** (0.5 / num_trained)
        inner_size = self.embedding[0].shape[1]
        self._token_weight = math.sqrt((1 - kept**2) * inner_size / 2) / kept

    def first_state(self, hidden: Tensor) -> Tensor:
        """Return the states [N, H] of empty paths."""
        return _normalised(hidden) / math.sqrt(2) if self._scales_input else hidden

    def advance(self, head: int, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Go on by one token of each path, as `sequential.SequentialHeads` says.

        Args:
            head: k.
            states: [N, H] for the first head, then [N, D].
            tokens: [N] int64.

        Returns:
            [N, D] states, which are the features too
        """
        mixed = F.linear(states, self.weight[head]).add(
            F.embedding(tokens, self.embedding[head]), alpha=self._token_weight
        )
        states = F.gelu(_normalised(mixed) * self.scale[head] + self.bias[head])
        return states, states


def _normalised(rows: Tensor) -> Tensor:
    """Rows with a mean square of one."""
    return rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + _EPS)
