"""The loss of a selector, over one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_medusa.heads.selector import NUM_CANDIDATES, Selector


@dataclass(frozen=True)
class _Candidates:
    """The guesses of one head for C predicted tokens, n each.

    Attributes:
        head: k.
        parents: [C] int64, the token before each predicted one.
        tokens: [C, n] int64.
        logits: [C, n] float32, scaled.
        wanted: [C, n] float32, the target's probability of each guess.
    """

    head: int
    parents: Tensor
    tokens: Tensor
    logits: Tensor
    wanted: Tensor


class SelectorLoss:
    """Collects the heads' best guesses of a batch, chunk by chunk, and learns from all at once.

    The loss is the cross entropy of the softmax over a head's guesses, with the selector's terms,
    to the target's distribution; other tokens do not count. It changes only the selector, not the
    heads, whose own loss decides the guesses.

    Args:
        selector: to be trained.
        logit_scale: factor on the heads' logits.
    """

    def __init__(self, selector: Selector, logit_scale: float) -> None:
        self._selector = selector
        self._scale = logit_scale
        self._parts: list[_Candidates] = []

    @torch.no_grad()
    def add(
        self, head: int, logits: Tensor, parents: Tensor, labels: Tensor, wanted: Tensor | None
    ) -> None:
        """Take a head's guesses of a chunk.

        Args:
            head: k.
            logits: [C, V].
            parents: [C] int64, the token before each predicted one.
            labels: [C] int64 tokens to predict, for cross entropy.
            wanted: [C, V] float32, the target's distribution, for KL; None for cross entropy.
        """
        values, tokens = logits.topk(min(NUM_CANDIDATES, logits.shape[1]), dim=-1)
        share = (tokens == labels[:, None]).float() if wanted is None else wanted.gather(1, tokens)
        self._parts.append(_Candidates(head, parents, tokens, values.float() * self._scale, share))

    def backward(self, scale: float, decay: float) -> Tensor:
        """Add the gradient of ``scale * sum over heads k of decay^k * loss`` to the selector's.

        Returns:
            [K] float32, each head's scaled loss, without its decay
        """
        num_heads = len(self._selector.depth)
        losses = torch.zeros(num_heads, device=self._selector.depth.device)
        for head in range(num_heads):
            parts = [part for part in self._parts if part.head == head]
            if not parts:
                continue
            parents, tokens, logits, wanted = (
                torch.cat([getattr(part, name) for part in parts])
                for name in ("parents", "tokens", "logits", "wanted")
            )
            scores = logits + self._selector.terms(parents[:, None], tokens, head).squeeze(1)
            # A guess that a draft vocabulary lacks has a logit of minus infinity.
            log_probs = scores.log_softmax(dim=-1).masked_fill(logits.isneginf(), 0.0)
            loss = -scale * torch.vdot(log_probs.flatten(), wanted.flatten())
            torch.autograd.backward(loss * decay**head)
            losses[head] = loss.detach()
        return losses
