"""The target's own input embedding, which heads that see the root read it by."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_medusa.errors import UserError


def target_embedding(
    target: nn.Module, vocab_size: int, size: int, heads: str
) -> Callable[[Tensor], Tensor]:
    """Return the layer that embeds tokens, as vLLM has split it: [B] to [B, E].

    It is called itself, so models that scale or norm what it gives have no say here, nor had they
    in training.

    Args:
        target: the target model.
        vocab_size: of the target.
        size: E, that the heads were trained with.
        heads: their name, for the message.

    Raises:
        UserError: if the target does not show one embedding of this size.

    """
    found = [
        module
        for module in target.modules()
        if isinstance(module, VocabParallelEmbedding)
        and not isinstance(module, ParallelLMHead)
        and (module.org_vocab_size, module.embedding_dim) == (vocab_size, size)
    ]
    if len(found) != 1:
        raise UserError(
            f"the heads {heads} see the last token by the target's embedding, and "
            f"{type(target).__name__} shows {len(found)} of {vocab_size} tokens and size {size}; "
            "use heads that were trained for this model without --root-aware"
        )
    return found[0]
