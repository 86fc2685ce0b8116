"""Typical acceptance: drafts that the target itself finds likely enough (arXiv 2401.10774, 3.3.1).

It is lossy: what it accepts is not a sample of the target's distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_medusa.tree.rows import NodeRows


@dataclass(frozen=True, kw_only=True)
class TypicalRule:
    """A draft token of probability p is typical if ``p > min(threshold, alpha * exp(-entropy))``.

    Attributes:
        posterior_threshold: every token with a larger probability is typical.
        posterior_alpha: factor on ``exp(-entropy)``; with a smaller one less likely tokens are
            typical.

    """

    posterior_threshold: float = 0.09
    posterior_alpha: float = 0.3


_LOSSLESS = TypicalRule(posterior_threshold=math.inf, posterior_alpha=math.inf)


@dataclass(frozen=True)
class TypicalBounds:
    """The rules of a step's requests; infinite where a request has lossless acceptance.

    Attributes:
        thresholds: [B] float32.
        alphas: [B] float32.

    """

    thresholds: Tensor
    alphas: Tensor

    @classmethod
    def make(
        cls, rules: Sequence[TypicalRule | None], device: torch.device | str = "cpu"
    ) -> TypicalBounds:
        """Make the tensors of each request's rule; None is lossless acceptance."""
        given = [rule or _LOSSLESS for rule in rules]
        return cls(
            torch.tensor([rule.posterior_threshold for rule in given], device=device),
            torch.tensor([rule.posterior_alpha for rule in given], device=device),
        )

    def set(self, req: int, rule: TypicalRule | None) -> None:
        """Change one request's rule, on the device."""
        given = rule or _LOSSLESS
        self.thresholds[req] = given.posterior_threshold
        self.alphas[req] = given.posterior_alpha

    def of_rows(self, logprobs: Tensor, req: Tensor) -> Tensor:
        """Return the log of the probability that a token has to exceed at each row.

        Args:
            logprobs: [R, V] of the target at each row.
            req: [R] request of each row.

        Returns:
            [R] float32.

        """
        # A token that is masked out has a log-probability of minus infinity, and 0 times that.
        entropy = -(logprobs.exp() * logprobs).nansum(dim=-1)
        typical = self.alphas[req].log() - entropy
        return torch.minimum(self.thresholds[req].log(), typical)


def take_typical(
    rows: NodeRows,
    target_tokens: Tensor,
    draft_tokens: Tensor,
    logits: Tensor,
    typical: TypicalBounds,
) -> Tensor:
    """Put draft tokens in place of the target's samples, so that the best typical path is accepted.

    A path is typical if all its draft tokens are typical, each at its parent. The longest typical
    path is taken; if there are several, the one with the largest probability. After its end the
    target's sample stays.

    Args:
        rows: the step's trees.
        target_tokens: [B, N + 1] token sampled from the target at each node.
        draft_tokens: [B, N] token of each draft node, N at least 1; negative ones are no tokens.
        logits: [R, V] float32 that the samples were taken from.
        typical: the rules.

    Returns:
        [B, N + 1] tokens for `accept_lossless`, which then accepts that path.

    """
    logprobs = logits.log_softmax(dim=-1)
    bounds = typical.of_rows(logprobs, rows.req)
    parent_rows = rows.row.gather(1, rows.parents[:, 1:])
    of_drafts = logprobs[parent_rows, draft_tokens.clamp(min=0)]
    likelihoods = torch.nn.functional.pad(of_drafts, (1, 0))
    counts = rows.is_run & (of_drafts > bounds[parent_rows]) & (draft_tokens >= 0)
    counts = torch.nn.functional.pad(counts, (1, 0), value=True)

    batch, num_nodes, width = rows.ancestors.shape
    ancestors = rows.ancestors.view(batch, -1)
    counts = counts.gather(1, ancestors).view(batch, num_nodes, width).all(dim=-1)
    is_step = torch.arange(width, device=logits.device) <= rows.depths[..., None]
    paths = likelihoods.gather(1, ancestors).view(batch, num_nodes, width)
    totals = paths.where(is_step, 0.0).sum(dim=-1)
    depths = rows.depths.where(counts, -1)
    is_longest = depths == depths.amax(dim=1, keepdim=True)
    best = totals.where(is_longest, -torch.inf).argmax(dim=1)

    path = rows.ancestors[torch.arange(batch, device=logits.device), best]
    before, behind = path[:, :-1], path[:, 1:]
    drafts = draft_tokens.gather(1, (behind - 1).clamp(min=0))
    # A shorter path repeats its last node, whose sample stays.
    tokens = torch.where(before == behind, target_tokens.gather(1, before), drafts)
    return target_tokens.scatter(1, before, tokens)
