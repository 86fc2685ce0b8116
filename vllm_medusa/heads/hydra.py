"""Hydra heads in their MLP form (arXiv 2402.05109, section 3).

Head k reads the hidden state and the target's embeddings of the root and of the k tokens below it,
side by side. Its first layer is ``R x + r + SiLU(W x + w)`` of this long vector x, where a Medusa
head's is ``x + SiLU(W x + w)``; further layers are the residual blocks of Medusa heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HydraHeads(nn.Module):
    """The layers of K Hydra heads before their lm_heads (see `sequential.SequentialHeads`).

    The state of a path is the vector x. New heads pass the target's hidden state through unchanged,
    as new Medusa heads do.

    Args:
        num_heads: K.
        num_layers: L, layers of each head.
        hidden_size: H, of the target's final hidden states.
        embedding_size: E, of the target's token embeddings.
        embed: from tokens [N] to the target's embeddings [N, E].
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        embedding_size: int,
        embed: Callable[[Tensor], Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        # W and R of one head in one matrix each: they are one product.
        sizes = [hidden_size + (head + 1) * embedding_size for head in range(num_heads)]
        self.first_weight = nn.ParameterList(zeros(2, hidden_size, size) for size in sizes)
        self.first_bias = nn.ParameterList(zeros(2, hidden_size) for _ in sizes)
        with torch.no_grad():
            for weight in self.first_weight:
                weight[1, :, :hidden_size].fill_diagonal_(1.0)
        shape = (num_heads, num_layers - 1, hidden_size)
        self.weight = zeros(*shape, hidden_size) if num_layers > 1 else None
        self.bias = zeros(*shape) if num_layers > 1 else None
        self._embed = embed

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        embed: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> HydraHeads:
        """Build heads of canonical tensors (`HeadsCheckpoint`), converted to `dtype`."""
        num_heads = sum(name.startswith("hydra.") and name.endswith(".bias") for name in tensors)
        _, hidden_size, input_size = tensors["hydra.0.weight"].shape
        blocks = tensors.get("blocks.weight")
        num_layers = 1 if blocks is None else 1 + blocks.shape[1]
        heads = cls(
            *(num_heads, num_layers, hidden_size, input_size - hidden_size),
            embed,
            dtype=dtype,
            device=device,
        )
        with torch.no_grad():
            for head in range(num_heads):
                heads.first_weight[head].copy_(tensors[f"hydra.{head}.weight"])
                heads.first_bias[head].copy_(tensors[f"hydra.{head}.bias"])
            if heads.weight is not None and heads.bias is not None:
                heads.weight.copy_(tensors["blocks.weight"])
                heads.bias.copy_(tensors["blocks.bias"])
        return heads

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The parameters that are stacks of matrices [..., out, in]."""
        return [*self.first_weight, *([] if self.weight is None else [self.weight])]

    @property
    def biases(self) -> list[nn.Parameter]:
        """The parameters that are stacks of biases."""
        return [*self.first_bias, *([] if self.bias is None else [self.bias])]

    def canonical_tensors(self) -> dict[str, Tensor]:
        """Return the parameters under the names of `HeadsCheckpoint`."""
        tensors = {}
        for head, (weight, bias) in enumerate(zip(self.first_weight, self.first_bias, strict=True)):
            tensors[f"hydra.{head}.weight"] = weight.detach()
            tensors[f"hydra.{head}.bias"] = bias.detach()
        if self.weight is not None and self.bias is not None:
            tensors["blocks.weight"] = self.weight.detach()
            tensors["blocks.bias"] = self.bias.detach()
        return tensors

    def first_state(self, hidden: Tensor) -> Tensor:
        """Return the states [N, H] of empty paths."""
        return hidden

    def advance(self, head: int, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Go on by one token of each path, as `sequential.SequentialHeads` says.

        Args:
            head: k.
            states: [N, H + k E].
            tokens: [N] int64.

        Returns:
            [N, H + (k + 1) E] states and [N, H] features
        """
        states = torch.cat((states, self._embed(tokens).to(states.dtype)), dim=-1)
        weight, bias = self.first_weight[head], self.first_bias[head]
        inner, features = F.linear(states, weight.flatten(0, 1), bias.flatten()).chunk(2, dim=-1)
        features = features + F.silu(inner)
        if self.weight is not None and self.bias is not None:
            for matrix, offset in zip(self.weight[head], self.bias[head], strict=True):
                features = features + F.silu(F.linear(features, matrix, offset))
        return states, features
