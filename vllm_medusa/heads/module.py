"""The computation of Medusa heads: residual blocks and lm_heads, all heads in one product.

A Medusa head (Cai et al., 2024, section 3.1.1) is a residual block `x + SiLU(W x + b)`, or several
in a row, followed by a projection onto the vocabulary. The blocks are small and the heads few, so
per-head calls would cost more than their arithmetic.

Root-aware heads also see the root, the token that follows the hidden state's own and that the
target has just sampled: its embedding goes through a matrix per head and is added to the hidden
state, before the first block.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_medusa.heads.checkpoint import HeadsCheckpoint


class MedusaHeads(nn.Module):
    """Stacked residual blocks of all Medusa heads.

    New heads are zero, so that every head passes the target's hidden state through unchanged: the
    start of the paper's training.

    Args:
        num_heads: K.
        num_layers: L, residual blocks per head.
        hidden_size: H, of the target's final hidden states.
        bias: whether the blocks' linear layers have biases.
        root_size: E, of the target's token embeddings, if the heads are root-aware.
        dtype: of the parameters.
        device: of the parameters.
    """

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        *,
        bias: bool,
        root_size: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        # One layer's weights are contiguous over heads, each (out, in) as in nn.Linear. Multiplying
        # by the transposed view is as fast as any layout in float32 and, in bfloat16 on AMX, more
        # than twice as fast as weights stored (in, out).
        shape = (num_layers, num_heads, hidden_size)
        self.weight = nn.Parameter(torch.zeros(*shape, hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device)) if bias else None
        self.root = None
        if root_size is not None:
            root = torch.zeros(num_heads, hidden_size, root_size, dtype=dtype, device=device)
            self.root = nn.Parameter(root)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: HeadsCheckpoint,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> "MedusaHeads":
        """Build the blocks of a loaded checkpoint, converted to `dtype`."""
        return cls.from_tensors(checkpoint.tensors, dtype, device)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> "MedusaHeads":
        """Build blocks of canonical tensors (`HeadsCheckpoint`), converted to `dtype`."""
        weight, bias = tensors["blocks.weight"], tensors.get("blocks.bias")
        root = tensors.get("root.weight")
        heads = cls(
            *weight.shape[:3],
            bias=bias is not None,
            root_size=None if root is None else root.shape[2],
            dtype=dtype,
            device=device,
        )
        with torch.no_grad():
            heads.weight.copy_(weight.transpose(0, 1))
            if heads.bias is not None:
                heads.bias.copy_(tensors["blocks.bias"].transpose(0, 1))
            if heads.root is not None:
                heads.root.copy_(tensors["root.weight"])
        return heads

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The parameters that are stacks of matrices [..., out, in]."""
        return [self.weight, *([] if self.root is None else [self.root])]

    @property
    def biases(self) -> list[nn.Parameter]:
        """The parameters that are stacks of biases."""
        return [] if self.bias is None else [self.bias]

    def canonical_tensors(self) -> dict[str, Tensor]:
        """Return the parameters under the names and in the layout of `HeadsCheckpoint`."""
        tensors = {"blocks.weight": self.weight.detach().transpose(0, 1).contiguous()}
        if self.bias is not None:
            tensors["blocks.bias"] = self.bias.detach().transpose(0, 1).contiguous()
        if self.root is not None:
            tensors["root.weight"] = self.root.detach()
        return tensors

    def forward(self, hidden: Tensor, roots: Tensor | None = None) -> Tensor:
        """Compute the features that the lm_heads read.

        Args:
            hidden: [B, H], the target's final hidden states (after its last norm).
            roots: [B, E], the target's embedding of the token after each; root-aware heads need it,
                others take none.

        Returns:
            [K, B, H]
        """
        x = hidden.expand(self.weight.shape[1], -1, -1)
        if self.root is not None:
            assert roots is not None, "root-aware heads see the root"
            x = torch.baddbmm(x, roots.expand(len(self.root), -1, -1), self.root.transpose(1, 2))
        for layer, weight in enumerate(self.weight):
            w = weight.transpose(1, 2)
            if self.bias is None:
                y = torch.bmm(x, w)
            else:
                y = torch.baddbmm(self.bias[layer].unsqueeze(1), x, w)
            x = x + F.silu(y)
        return x


def head_logits(
    features: Tensor,
    *,
    weight: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """Project the heads' features onto the vocabulary, all heads in one or two products.

    Either `weight` or both `down` and `up` are given. `logit_scale` is not applied: it is positive
    and so changes no ranking.

    Args:
        features: [K, B, H] of `MedusaHeads`.
        weight: [K, V, H], one lm_head per head, or [V, H], one for all (the target's own, say).
        down: [K, rank, H], first factor of low-rank lm_heads.
        up: [K, V, rank], second factor.

    Returns:
        logits [K, B, V]

    Raises:
        ValueError: neither or both kinds of lm_heads are given.
    """
    if weight is not None and down is None and up is None:
        return F.linear(features, weight) if weight.ndim == 2 else _per_head(features, weight)
    if weight is None and down is not None and up is not None:
        return _per_head(_per_head(features, down), up)
    raise ValueError("give either weight, or down and up")


def _per_head(features: Tensor, weight: Tensor) -> Tensor:
    """[K, B, in] times [K, out, in] to [K, B, out]."""
    return torch.bmm(features, weight.transpose(1, 2))
