"""Layers as they are before the first step of training."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_medusa.errors import UserError
from vllm_medusa.heads.gated import GatedLayers
from vllm_medusa.heads.prefix import PrefixAttention
from vllm_medusa.heads.selector import Selector
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.settings import TrainSettings

_ATTENTION_HEAD_SIZE = 64
#: Inner size of a recurrent head's layers, in hidden sizes.
_INNER = 3


def new_selector(settings: TrainSettings, target: FrozenTarget, num_heads: int) -> Selector:
    """Make a selector whose table of parents comes from the target's embedding.

    The table holds each token's coordinates on the embedding's first principal axes (not centred),
    each axis scaled to a mean square of one. So similar tokens learn together.

    Raises:
        UserError: its rank is above the size of the target's embeddings.
    """
    rank, size = settings.selector_rank, target.embedding.shape[1]
    if rank > size:
        raise UserError(
            f"--selector-rank {rank}: the target's embeddings have a size of {size}; give a "
            "smaller rank"
        )
    exact = target.embedding.detach().double()
    _, axes = torch.linalg.eigh(exact.T @ exact)
    table = exact @ axes[:, -rank:].flip(1)
    table /= table.square().mean(dim=0).clamp(min=1e-12).sqrt()
    return Selector(table.float(), num_heads)


def new_prefix_attention(settings: TrainSettings, target: FrozenTarget) -> PrefixAttention:
    """Make a prefix attention as wide as the target's hidden states."""
    head_size = min(_ATTENTION_HEAD_SIZE, target.hidden_size)
    layer = PrefixAttention(
        target.hidden_size,
        target.embedding.shape[1],
        settings.prefix_window,
        target.hidden_size // head_size,
        head_size,
        dtype=torch.float32,
        device=target.weight.device,
    )
    _draw(layer.projection, settings.seed)
    return layer


def new_gated_layers(settings: TrainSettings, target: FrozenTarget) -> GatedLayers:
    """Make the layers of a recurrent head."""
    layers = GatedLayers(
        target.hidden_size,
        target.embedding.shape[1],
        settings.num_layers,
        settings.inner_size or _INNER * target.hidden_size,
        dtype=torch.float32,
        device=target.weight.device,
    )
    _draw(layers.gate_up, settings.seed)
    return layers


@torch.no_grad()
def _draw(parameter: Tensor, seed: int) -> None:
    """Draw matrices [..., out, in] that read states; those that write them stay zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(parameter.shape, generator=generator)
    parameter.copy_(drawn * drawn.shape[-1] ** -0.5)


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
    # From the small Gram matrix: a decomposition of the V x H matrix itself would take minutes.
    _, vectors = torch.linalg.eigh(exact.T @ exact)
    down = vectors[:, -rank:].flip(1).T
    up = exact @ down.T
    scale = up.norm(dim=0).clamp(min=1e-12).sqrt()
    return (down * scale[:, None]).float().contiguous(), (up / scale).float().contiguous()
