"""The heads that are trained: residual blocks, and the lm_heads that they project with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vllm_medusa.errors import UserError
from vllm_medusa.heads.checkpoint import HeadsCheckpoint, HeadsSpec
from vllm_medusa.heads.io.write import WriteFormat, needs_lm_head
from vllm_medusa.heads.module import MedusaHeads
from vllm_medusa.training.settings import TrainSettings

_KINDS = {"shared": "target", "own": "own", "low-rank": "low_rank"}


class TrainableHeads(nn.Module):
    """Medusa heads in float32, which start as the target's own next-token guess.

    The blocks start as the identity. Lm_heads of their own start as copies of the target's,
    low-rank ones as its best approximation of their rank (a truncated singular value
    decomposition).

    Args:
        settings: the heads' number and kind.
        lm_head: [V, H], the target's; used as it is by shared heads, and never trained.

    Raises:
        UserError: the rank is above the hidden size.
    """

    def __init__(self, settings: TrainSettings, lm_head: Tensor) -> None:
        super().__init__()
        self.lm_head_kind = settings.lm_head
        self.blocks = MedusaHeads(
            settings.num_heads,
            settings.num_layers,
            lm_head.shape[1],
            bias=True,
            dtype=torch.float32,
            device=lm_head.device,
        )
        self._shared = lm_head.detach()  # a plain tensor: no parameter of this module
        if settings.lm_head == "own":
            self.weight = _copies(lm_head.float(), settings.num_heads)
        elif settings.lm_head == "low-rank":
            assert settings.rank is not None
            if settings.rank > lm_head.shape[1]:
                raise UserError(
                    f"--rank {settings.rank}: the target's hidden size is {lm_head.shape[1]}, and "
                    "no lm_head has a larger rank; give a smaller one, or --lm-head own"
                )
            down, up = low_rank_factors(lm_head, settings.rank)
            self.down = _copies(down, settings.num_heads)
            self.up = _copies(up, settings.num_heads)

    @property
    def num_heads(self) -> int:
        """K."""
        return self.blocks.weight.shape[1]

    def features(self, hidden: Tensor) -> Tensor:
        """Apply the blocks, with products in the dtype of `hidden`: [N, H] to [K, N, H]."""
        low = hidden.dtype != torch.float32
        with torch.autocast(hidden.device.type, dtype=hidden.dtype if low else None, enabled=low):
            features: Tensor = self.blocks(hidden)
        return features

    def factors(self, head: int) -> list[Tensor]:
        """Return the matrices that project one head's features, each (out, in), first to last."""
        if self.lm_head_kind == "shared":
            return [self._shared]
        if self.lm_head_kind == "own":
            return [self.weight[head]]
        return [self.down[head], self.up[head]]

    def logits(self, features: Tensor, head: int) -> Tensor:
        """Project one head's features onto the vocabulary: [N, H] to [N, V]."""
        for factor in self.factors(head):
            features = nn.functional.linear(features, factor.to(features.dtype))
        return features

    def checkpoint(self, dtype: torch.dtype, base_model: str) -> HeadsCheckpoint:
        """Return the heads as they are written, in `dtype`."""
        tensors = dict(self.blocks.canonical_tensors())
        if self.lm_head_kind == "own":
            tensors["lm_head.weight"] = torch.stack(list(self.weight)).detach()
        elif self.lm_head_kind == "low-rank":
            tensors["lm_head.down"] = torch.stack(list(self.down)).detach()
            tensors["lm_head.up"] = torch.stack(list(self.up)).detach()
        vocab_size, hidden_size = self._shared.shape
        spec = HeadsSpec(
            source_format="native",
            num_heads=self.num_heads,
            num_layers=self.blocks.weight.shape[0],
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            draft_vocab_size=None,
            lm_head=_KINDS[self.lm_head_kind],  # type: ignore[arg-type]
            has_bias=True,
            logit_scale=1.0,
            dtype=dtype,
        )
        stored = {name: tensor.to("cpu", dtype) for name, tensor in tensors.items()}
        return HeadsCheckpoint(spec, stored, base_model=base_model)


def write_format_of(checkpoint: HeadsCheckpoint) -> WriteFormat:
    """Return the published format where it can hold the heads, our own where it cannot."""
    if checkpoint.spec.lm_head == "low_rank" or needs_lm_head(checkpoint, "tgi"):
        return "native"
    return "tgi"


def _copies(tensor: Tensor, count: int) -> nn.ParameterList:
    """One parameter per head: the gradient of a slice would be as large as all of them."""
    return nn.ParameterList(nn.Parameter(tensor.clone()) for _ in range(count))


def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the two factors of the best approximation of a matrix by one of lower rank.

    Args:
        weight: [V, H].
        rank: at most H.

    Returns:
        down [rank, H] and up [V, rank], float32, of equal norms along each of the rank dimensions;
        `up @ down` is the truncated singular value decomposition.
    """
    exact = weight.double()
    # Of the small Gram matrix: a decomposition of the V x H matrix itself would take minutes.
    _, vectors = torch.linalg.eigh(exact.T @ exact)
    down = vectors[:, -rank:].flip(1).T
    up = exact @ down.T
    scale = up.norm(dim=0).clamp(min=1e-12).sqrt()
    return (down * scale[:, None]).float().contiguous(), (up / scale).float().contiguous()
