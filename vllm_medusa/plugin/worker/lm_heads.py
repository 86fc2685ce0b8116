"""The lm_heads of one tensor-parallel rank, as linear layers of the platform.

They are layers because vLLM optimises layers for each platform. On a CPU their weights are
prepacked (``dispatch_cpu_unquantized_gemm``, ``model_executor/layers/utils.py``); one product of
the stacked weights takes up to twice as long. The residual blocks stay one product for all heads:
they are small, and one call for each head would take longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsReader
from vllm_medusa.plugin.worker.products import platform_linear


@dataclass(frozen=True)
class LmHeads:
    """A rank's rows of the lm_heads.

    Attributes:
        first_token: draft id of the first row.
        logits: from features [K, B, H] to logits [K, B, rows], in one part for all heads or one
            for each.
        of_head: from features [N, H] and the head that they are of to logits [N, rows].

    """

    first_token: int
    logits: Callable[[Tensor], list[Tensor]]
    of_head: Callable[[Tensor, int], Tensor]


def target_lm_heads(target: nn.Module, heads: str) -> LmHeads:
    """Return the target's own lm_head, as vLLM split it over ranks, for all heads.

    Args:
        target: the target model.
        heads: name of the heads, for the message.

    Raises:
        UserError: if the target does not expose its lm_head.

    """
    lm_head: Any = _find_lm_head(target)
    if lm_head is None:
        raise UserError(
            f"the heads {heads} use the target's lm_head, which {type(target).__name__} does not "
            "expose; convert them to lm_heads of their own (vllm-medusa convert --to vllm)"
        )
    shard = lm_head.shard_indices
    num_tokens = shard.num_org_elements

    def of_head(features: Tensor, _: int) -> Tensor:
        flat: Tensor = lm_head.quant_method.apply(lm_head, features)
        return flat[:, :num_tokens]

    def logits(features: Tensor) -> list[Tensor]:
        return [of_head(features.flatten(0, 1), 0).unflatten(0, features.shape[:2])]

    return LmHeads(shard.org_vocab_start_index, logits, of_head)


def read_lm_heads(
    reader: HeadsReader,
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    rank: int,
    world_size: int,
) -> LmHeads:
    """Read a rank's rows of the heads' own lm_heads.

    Args:
        reader: the heads.
        num_heads: number of heads that draft.
        dtype: of the layers.
        device: of the layers.
        rank: rank of this process among those that share the lm_heads.
        world_size: number of these ranks.

    Raises:
        UserError: if the rows hold values that are not finite.

    """
    num_rows = reader.spec.draft_vocab_size or reader.spec.vocab_size
    assert num_rows is not None, "lm_heads have rows"
    start, stop = (num_rows * part // world_size for part in (rank, rank + 1))

    def layer(head: int) -> nn.Module:
        bias = reader.read_biases(head, start, stop)
        return platform_linear(reader.read_rows(head, start, stop), bias, dtype, device)

    if reader.spec.lm_head == "common":
        common = layer(0)
        return LmHeads(
            start, lambda features: [common(features)], lambda features, _: common(features)
        )
    layers = [layer(head) for head in range(num_heads)]

    def logits(features: Tensor) -> list[Tensor]:
        parts = zip(layers, features.split(1), strict=True)
        return [layer(feature) for layer, feature in parts]

    if reader.spec.lm_head == "own":
        return LmHeads(start, logits, lambda features, head: layers[head](features))
    down = reader.read("lm_head.down", num_heads).to(device, dtype).transpose(1, 2)
    return LmHeads(
        start,
        lambda features: logits(features.bmm(down)),
        lambda features, head: layers[head](features @ down[head]),
    )


def _find_lm_head(target: Any) -> nn.Module | None:
    """Return the target's output embedding, which in some models is the input embedding."""
    if hasattr(target, "get_language_model"):
        target = target.get_language_model()
    lm_head: nn.Module | None = getattr(target, "lm_head", None)
    if lm_head is not None:
        return lm_head
    return getattr(getattr(target, "model", None), "embed_tokens", None)
