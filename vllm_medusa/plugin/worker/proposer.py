"""The draft proposer: hidden states -> heads -> guesses -> tree tokens.

To vLLM it is a ``custom_class`` proposer; the runner calls `propose` itself, because vLLM hands
such a proposer no hidden states (``propose_draft_token_ids``, ``gpu_model_runner.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from vllm_medusa.config import CONFIG_KEY, MedusaConfig
from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsCheckpoint, MedusaHeads, head_logits, load_heads
from vllm_medusa.tree.layout import TreeLayout


class MedusaProposer:
    """Drafts a tree of tokens from the target's hidden states.

    Args:
        vllm_config: vLLM's configuration; ours is in its ``additional_config``.

    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.config = MedusaConfig.from_dict(vllm_config.additional_config[CONFIG_KEY])
        self._vllm_config = vllm_config
        self._device = vllm_config.device_config.device
        self._layout = TreeLayout.build(self.config.tree, self._device)
        self._heads: MedusaHeads
        self._local_logits: Callable[[Tensor], Tensor]
        self._first_token = 0
        self._token_map: Tensor | None = None

    def load_model(self, target: nn.Module) -> None:
        """Load the heads, each tensor-parallel rank its share of their lm_heads.

        Raises:
            UserError: if the heads are not complete or do not fit the target.

        """
        model_config = self._vllm_config.model_config
        checkpoint = load_heads(
            self.config.heads,
            revision=self.config.revision,
            target_hidden_size=model_config.get_hidden_size(),
            target_vocab_size=model_config.get_vocab_size(),
        )
        dtype = model_config.dtype
        self._heads = MedusaHeads.from_checkpoint(checkpoint, dtype, self._device)
        if checkpoint.spec.lm_head == "target":
            self._use_target_lm_head(target)
        else:
            self._use_own_lm_heads(checkpoint, dtype)
        token_map = checkpoint.tensors.get("token_map")
        self._token_map = None if token_map is None else token_map.to(self._device)

    @torch.inference_mode()
    def propose(self, hidden_states: Tensor) -> Tensor:
        """Draft one tree per request.

        Args:
            hidden_states: [B, H] target's final hidden state at each request's last accepted
                token.

        Returns:
            [B, N] int64 token of each draft node.

        """
        tree = self.config.tree
        features = self._heads(hidden_states, tree.depth)
        logits = self._local_logits(features)
        # Siblings are told apart by rank alone, so a rank's place among equals does not matter.
        values, tokens = logits.topk(min(tree.top_k, logits.shape[-1]), dim=-1)
        tokens = tokens + self._first_token
        if get_tensor_model_parallel_world_size() > 1:
            # In one piece and as float32, which vLLM's collectives take on every platform and which
            # holds every token id exactly.
            guesses = torch.stack((values.float(), tokens.float()))
            values, tokens = tensor_model_parallel_all_gather(guesses, dim=-1)
            best = values.topk(tree.top_k, dim=-1).indices
            tokens = tokens.gather(-1, best).long()
        if self._token_map is not None:
            tokens = self._token_map[tokens]
        return self._layout.draft_tokens(tokens)

    def _use_target_lm_head(self, target: nn.Module) -> None:
        lm_head: Any = _find_lm_head(target)
        if lm_head is None:
            raise UserError(
                f"the heads {self.config.heads} use the target's lm_head, which "
                f"{type(target).__name__} does not show; convert them to lm_heads of their own "
                "(vllm-medusa convert --to vllm)"
            )
        shard = lm_head.shard_indices
        self._first_token = shard.org_vocab_start_index
        num_tokens = shard.num_org_elements

        def local_logits(features: Tensor) -> Tensor:
            logits = lm_head.quant_method.apply(lm_head, features.flatten(0, 1))
            return logits[:, :num_tokens].unflatten(0, features.shape[:2])

        self._local_logits = local_logits

    def _use_own_lm_heads(self, checkpoint: HeadsCheckpoint, dtype: torch.dtype) -> None:
        tensors = checkpoint.tensors
        depth = self.config.tree.depth
        rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()

        def load(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, dtype)

        def shard(tensor: Tensor) -> Tensor:
            self._first_token, stop = _shard_bounds(tensor.shape[-2], rank, world_size)
            return load(tensor[..., self._first_token : stop, :])

        if checkpoint.spec.lm_head == "low_rank":
            down, up = load(tensors["lm_head.down"][:depth]), shard(tensors["lm_head.up"][:depth])
            self._local_logits = lambda features: head_logits(features, down=down, up=up)
        else:
            own = tensors["lm_head.weight"]
            weight = shard(own if own.ndim == 2 else own[:depth])
            self._local_logits = lambda features: head_logits(features, weight=weight)


def _find_lm_head(target: Any) -> nn.Module | None:
    """Return the target's output embedding, which in some models is the input embedding."""
    if hasattr(target, "get_language_model"):
        target = target.get_language_model()
    lm_head: nn.Module | None = getattr(target, "lm_head", None)
    if lm_head is not None:
        return lm_head
    return getattr(getattr(target, "model", None), "embed_tokens", None)


def _shard_bounds(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the rows of a rank; all ranks but the last have equally many."""
    size = -(-num_rows // world_size)
    return rank * size, min((rank + 1) * size, num_rows)
