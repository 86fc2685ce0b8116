"""The frozen target: its hidden states, and its own distribution of the next token."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from vllm_medusa.errors import UserError
from vllm_medusa.heads.io.resolve import resolve

# Logits in memory at the same time, by device: they fit into a CPU's cache, or keep a GPU busy.
_CHUNK_LOGITS = {"cpu": 2**19, "cuda": 2**27}


def chunk_size(vocab_size: int, device: torch.device) -> int:
    """Return C: the number of positions whose logits are in memory at the same time."""
    return max(16, _CHUNK_LOGITS.get(device.type, 2**24) // vocab_size)


class FrozenTarget:
    """A causal language model that is read, and trained by nobody but `training.backbone`.

    Args:
        model: of `transformers`, on its device and in its dtype.
        dtype: of the products, if not that of the weights.

    Attributes:
        model: the whole model.
        weight: [V, H], of its lm_head.
        embedding: [V, E], of its input embedding, as it is stored.
        hidden_size, vocab_size: H and V.
        max_tokens: its largest number of positions.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self._body: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
        self._compiled: Any = None
        self._compiled_shape: tuple[int, int] | None = None
        self._lm_head: nn.Linear | None = model.get_output_embeddings()
        if self._body is None or self._body is model or self._lm_head is None:
            raise UserError(
                f"the target is a {type(model).__name__}, which does not expose its decoder and "
                "its lm_head; name a causal language model"
            )
        self.weight: Tensor = self._lm_head.weight
        self.embedding: Tensor = model.get_input_embeddings().weight
        self.vocab_size, self.hidden_size = self.weight.shape
        self._dtype = dtype or self.weight.dtype
        config = model.config.get_text_config()
        self.max_tokens: int = getattr(config, "max_position_embeddings", None) or 2**20

    @torch.no_grad()
    def hidden(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Compute the hidden states after the final norm, which vLLM feeds the heads.

        A position attends only to its own document: without an attention mask and a cache,
        `transformers` begins a document wherever position_ids do not rise by one. `check` proves
        that this target does so.

        Args:
            tokens: [B, S] int64, packed documents.
            position_ids: [B, S] int64, from 0 in every document.

        Returns:
            [B, S, H]
        """
        return self.forward(tokens, position_ids)

    def forward(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Compute the same with the graph to parameters that are trained, if any are."""
        body = self._compiled if tokens.shape == self._compiled_shape else self._body
        with self._products():
            output = body(input_ids=tokens, position_ids=position_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden.to(self._dtype)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the target's own logits: [..., H] to [..., V]."""
        return self.project(hidden)

    def project(self, hidden: Tensor) -> Tensor:
        """Compute the same with its graph."""
        assert self._lm_head is not None
        with self._products():
            logits: Tensor = self._lm_head(hidden)
        return logits

    def compile(self, shape: tuple[int, int]) -> None:
        """Compile the body for batches of one shape [B, S]; others run as they are."""
        self._compiled = torch.compile(self._body, dynamic=False)
        self._compiled_shape = shape

    def fingerprint(self) -> str:
        """Return a hash of the lm_head, which differs between targets of the same sizes."""
        weight = self.weight.detach().cpu().contiguous().view(torch.uint8)
        return hashlib.sha256(weight.numpy().data).hexdigest()[:16]

    @torch.no_grad()
    def check(self, needs_distribution: bool) -> None:
        """Check on a few tokens two properties that training relies on.

        Args:
            needs_distribution: whether the loss needs the target's own distribution.

        Raises:
            UserError: packed documents see each other, or the model's logits are not those of
                its lm_head (capped or scaled).
        """
        device = self.weight.device
        tokens = (torch.arange(12, device=device) * 7 + 1) % self.vocab_size
        alone = [
            self.hidden(part[None], torch.arange(6, device=device)[None])
            for part in torch.split(tokens, 6)
        ]
        packed = self.hidden(tokens[None], torch.arange(6, device=device).repeat(2)[None])
        if not _close(torch.cat(alone, dim=1), packed):
            raise UserError(
                f"{type(self.model).__name__}: documents packed into one sequence see each other "
                "with the installed transformers; update transformers"
            )
        with self._products():
            own = self.model(input_ids=tokens[None, :6], use_cache=False).logits
        if needs_distribution and not _close(own, self.logits(alone[0])):
            raise UserError(
                f"{type(self.model).__name__}: scales or caps the logits of its lm_head, so that "
                "they are not its distribution; use --loss ce, without --joint"
            )

    def _products(self) -> torch.autocast:
        is_lower = self._dtype != self.weight.dtype
        return torch.autocast(
            self.weight.device.type, dtype=self._dtype if is_lower else None, enabled=is_lower
        )


def load_target(
    name: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    weights: torch.dtype | None = None,
) -> FrozenTarget:
    """Load the target with `transformers`.

    Args:
        name: directory or hub name.
        revision: of a hub name.
        dtype: of the products, and of the weights too if `weights` does not say another.
        device: to compute on.
        weights: their dtype.

    Raises:
        UserError: there is no such model, it cannot be loaded, or it is not a causal language
            model.
    """
    from transformers import AutoModelForCausalLM

    resolve(name, "model", None, revision=revision)  # its message is more precise
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=weights or dtype
        )
    except Exception as exc:  # its own errors, and those of the hub, safetensors and the OS
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise UserError(
            f"model {name!r}: transformers cannot load it ({type(exc).__name__}: {reason}); name a "
            "causal language model that it can load"
        ) from None
    return FrozenTarget(model.to(device), dtype)


def _close(first: Tensor, second: Tensor) -> bool:
    """Whether the tensors are equal up to rounding in their dtype."""
    tolerance = 1e-4 if first.dtype == torch.float32 else 0.05
    scale = first.float().abs().max()
    return bool((first.float() - second.float()).abs().max() <= tolerance * scale)
