"""Heads read from files, in the form that `ranks` measures."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_medusa.heads import HeadsCheckpoint, MedusaHeads
from vllm_medusa.heads.io.formats import LmHeadKind
from vllm_medusa.heads.prefix import PrefixAttention
from vllm_medusa.heads.recurrent import RecurrentHeads
from vllm_medusa.heads.selector import Selector
from vllm_medusa.heads.sequential import SequentialHeads, features_along, make_sequential
from vllm_medusa.target.frozen import FrozenTarget

_LM_HEADS: dict[LmHeadKind, tuple[str, ...]] = {
    "own": ("lm_head.weight",),
    "common": ("lm_head.weight",),
    "low_rank": ("lm_head.down", "lm_head.up"),
    "target": (),
}


class StoredHeads:
    """The heads of a checkpoint, in the target's dtype and on its device (see `ranks.Heads`).

    Args:
        checkpoint: the heads.
        target: its lm_head is used if the heads have none, and its embedding if they read it.

    """

    def __init__(self, checkpoint: HeadsCheckpoint, target: FrozenTarget) -> None:
        device, dtype = target.weight.device, target.weight.dtype
        self.num_heads = checkpoint.spec.num_heads
        self._embedding = target.embedding
        self._sequential: SequentialHeads | None = None
        self._recurrent: RecurrentHeads | None = None
        if checkpoint.spec.kind == "recurrent":
            self._recurrent = RecurrentHeads.from_tensors(
                checkpoint.tensors, self._embed, dtype, device
            )
        elif checkpoint.spec.is_sequential:
            self._sequential = make_sequential(
                checkpoint.spec, checkpoint.tensors, self.num_heads, self._embed, dtype, device
            )
        else:
            blocks = MedusaHeads.from_checkpoint(checkpoint, dtype, device)
            self._blocks = blocks.requires_grad_(False)
        self._prefix: PrefixAttention | None = None
        if checkpoint.spec.prefix_window is not None and self._recurrent is None:
            prefix = PrefixAttention.from_tensors(checkpoint.tensors, dtype, device)
            self._prefix = prefix.requires_grad_(False)
        # The matrices that project, first to last: [K, out, in], or [out, in] for all heads.
        self._weights = [
            checkpoint.tensors[name].to(device, dtype)
            for name in _LM_HEADS[checkpoint.spec.lm_head]
        ] or [target.weight]
        bias = checkpoint.tensors.get("lm_head.bias")
        self._bias = None if bias is None else bias.to(device, dtype)
        token_map = checkpoint.tensors.get("token_map")
        self._token_map = None if token_map is None else token_map.to(device)
        self._vocab_size = target.vocab_size
        self.logit_scale = checkpoint.spec.logit_scale
        self.selector: Selector | None = None
        if checkpoint.spec.selector_rank is not None:
            self.selector = Selector.from_tensors(checkpoint.tensors, dtype, device)

    def in_context(self, hidden: Tensor, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Run the prefix attention, if the heads have one: [B, S, H] to the same.

        Recurrent heads run it at every depth: their features [B, S, K H] are what this returns.
        """
        if self._recurrent is not None:
            return self._recurrent.along(self.num_heads, hidden, tokens, position_ids)
        if self._prefix is None:
            return hidden
        return self._prefix.along(hidden, self._embed(tokens.roll(-1, 1)), position_ids)

    def features(self, hidden: Tensor, following: Tensor) -> Tensor:
        """Compute what the lm_heads read: [N, H] states and [N, K] tokens to [K, N, F]."""
        if self._recurrent is not None:
            return RecurrentHeads.by_head(self.num_heads, hidden)
        if self._sequential is not None:
            return features_along(self._sequential, self.num_heads, hidden, following)
        is_aware = self._blocks.root is not None
        features: Tensor = self._blocks(hidden, self._embed(following[:, 0]) if is_aware else None)
        return features

    def logits(self, features: Tensor, head: int) -> Tensor:
        """Project one head's features onto the target's vocabulary: [N, F] to [N, V]."""
        for weight in self._weights:
            features = F.linear(features, weight if weight.ndim == 2 else weight[head])
        if self._bias is not None:
            features = features + self._bias[head]
        if self._token_map is None:
            return features
        logits = features.new_full((len(features), self._vocab_size), -torch.inf)
        return logits.index_copy_(1, self._token_map, features)

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self._embedding)
