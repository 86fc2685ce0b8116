"""Gated layers of a recurrent head, as those of the models that it drafts for.

The token's embedding is added to the state. Then each layer is the MLP of a Llama with its norm:
`x + D (SiLU(G n) * U n)`, where n is x divided by its root mean square (arXiv 2002.05202, SwiGLU).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_medusa.heads.prefix import Product, normalised


class GatedLayers(nn.Module):
    """The embedding's matrix and L layers of the inner size M.

    New layers pass the states through unchanged.

    Args:
        hidden_size: H, of the states.
        embedding_size: E, of the target's token embeddings.
        num_layers: L.
        inner_size: M.
        dtype: of the parameters.
        device: of the parameters.

    Attributes:
        product: multiplies by the matrices.
    """

    def __init__(
        self,
        hidden_size: int,
        embedding_size: int,
        num_layers: int,
        inner_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        self.embedded = zeros(hidden_size, embedding_size)
        # Gate and up in one, because a product of both is faster.
        self.gate_up = zeros(num_layers, 2, inner_size, hidden_size)
        self.down = zeros(num_layers, hidden_size, inner_size)
        self.product: Product = F.linear

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> GatedLayers:
        """Build layers of canonical tensors (`HeadsCheckpoint`), converted to `dtype`."""
        num_layers, _, inner_size, _ = tensors["gated.gate_up"].shape
        sizes = (*tensors["gated.embedded"].shape, num_layers, inner_size)
        layers = cls(*sizes, dtype=dtype, device=device)
        with torch.no_grad():
            for name, parameter in layers.named_parameters():
                parameter.copy_(tensors[f"gated.{name}"])
        return layers

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The parameters, which are matrices or stacks of them [..., out, in]."""
        return [self.embedded, self.gate_up, self.down]

    @property
    def biases(self) -> list[nn.Parameter]:
        """None."""
        return []

    def canonical_tensors(self) -> dict[str, Tensor]:
        """Return the parameters under the names of `HeadsCheckpoint`."""
        return {f"gated.{name}": value.detach() for name, value in self.named_parameters()}

    def forward(self, states: Tensor, following: Tensor) -> Tensor:
        """Go on by one token.

        Args:
            states: [..., H].
            following: [..., E], the target's embedding of the token after each.

        Returns:
            [..., H]
        """
        x = states + self.product(following, self.embedded)
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            gate, up = self.product(normalised(x), gate_up.flatten(0, 1)).chunk(2, dim=-1)
            x = x + self.product(F.silu(gate) * up, down)
        return x
