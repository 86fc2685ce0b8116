"""The target's own input embedding, with which root-aware heads read the root."""

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
    """Return the layer that embeds tokens, [B] to [B, E], as vLLM split it over ranks.

    The layer itself is called, without the scaling or norm that some models add after it, as in
    training.

    Args:
        target: the target model.
        vocab_size: of the target.
        size: E, of the embeddings in training.
        heads: name of the heads, for the message.

    Raises:
        UserError: if the target does not expose exactly one embedding of this size.

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
            f"the heads {heads} need the target's embedding of {vocab_size} tokens and size {size}"
            f", but {type(target).__name__} exposes {len(found)} of these; "
            "use heads of this model that do not read it"
        )
    return found[0]
