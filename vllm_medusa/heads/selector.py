"""The selector: a head's best guesses, ranked again by the token that they would follow.

A Medusa head guesses without the guesses of the heads before it. The selector adds a term to the
logit of each of a head's best guesses. The term depends, with low rank, on the guess and on its
parent, the token of the depth above (for the first head the root). So a node's token depends on its
parent's token, as with sequential heads (Hydra, arXiv 2402.05109). But all heads still run at once,
and no lm_head runs for a single node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vllm_medusa.tree.layout import Level

#: Number of a head's best guesses that are ranked again; the others keep their places.
NUM_CANDIDATES = 16


class Selector(nn.Module):
    """Tables of rank r for K heads and V tokens of the target's vocabulary.

    The term of a guess c of head k under a parent p is ``sum(parent[p] * depth[k] * child[c])``.
    A new selector changes nothing: its child's table is zero.

    Args:
        parent: [V, r] to start from.
        num_heads: K.
    """

    def __init__(self, parent: Tensor, num_heads: int) -> None:
        super().__init__()
        self.parent = nn.Parameter(parent)
        self.child = nn.Parameter(torch.zeros_like(parent))
        self.depth = nn.Parameter(parent.new_ones(num_heads, parent.shape[1]))

    @property
    def rank(self) -> int:
        """r."""
        return self.parent.shape[1]

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> Selector:
        """Build a selector of canonical tensors (`HeadsCheckpoint`), converted to `dtype`."""
        depth = tensors["selector.depth"].to(device, dtype)
        selector = cls(tensors["selector.parent"].to(device, dtype), len(depth))
        selector.child = nn.Parameter(tensors["selector.child"].to(device, dtype))
        selector.depth = nn.Parameter(depth)
        return selector

    def canonical_tensors(self) -> dict[str, Tensor]:
        """Return the parameters under the names of `HeadsCheckpoint`."""
        return {
            "selector.parent": self.parent.detach(),
            "selector.child": self.child.detach(),
            "selector.depth": self.depth.detach(),
        }

    def terms(self, parents: Tensor, candidates: Tensor, head: int) -> Tensor:
        """Return what is added to the logits of guesses, in float32.

        Args:
            parents: [B, M] int64 tokens.
            candidates: [B, C] int64 tokens that the head guesses.
            head: k.

        Returns:
            [B, M, C]
        """
        above = nn.functional.embedding(parents, self.parent) * self.depth[head]
        below = nn.functional.embedding(candidates, self.child)
        return torch.bmm(above.float(), below.float().transpose(1, 2))

    def rank_again(self, logits: Tensor, parents: Tensor, head: int, scale: float) -> Tensor:
        """Permute the logits of a head's best guesses into the order of the selector.

        Args:
            logits: [N, V] of the target's vocabulary.
            parents: [N] int64, the token before the guess; -1 (no token) is allowed.
            head: k.
            scale: factor on the logits, positive.

        Returns:
            [N, V]
        """
        values, tokens = logits.topk(min(NUM_CANDIDATES, logits.shape[1]), dim=-1)
        terms = self.terms(parents.clamp(min=0)[:, None], tokens, head).squeeze(1)
        _, order = best_first(values.float() * scale + terms)
        return logits.scatter(1, tokens.gather(1, order), values)


def best_first(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores [..., C], the largest first, and their order; equal ones keep theirs."""
    return scores.sort(dim=-1, descending=True, stable=True)


@dataclass(frozen=True)
class Below:
    """The guesses of one head below M parents of each of B requests: C tokens each.

    Attributes:
        tokens: [B, M, C] int64 of the target's vocabulary, the best first.
        scores: [B, M, C] float32, the head's logits with the selector's terms.
    """

    tokens: Tensor
    scores: Tensor


def guess_below(
    selector: Selector, head: int, logits: Tensor, tokens: Tensor, parents: Tensor
) -> Below:
    """Rank a head's guesses again below each of several parents.

    Args:
        selector: of the heads.
        head: k.
        logits: [B, C] of the head's guesses, the best first, scaled.
        tokens: [B, C] int64 tokens of the target's vocabulary.
        parents: [B, M] int64.
    """
    size = min(NUM_CANDIDATES, tokens.shape[1])
    terms = selector.terms(parents, tokens[:, :size], head)
    scores, order = best_first(logits[:, None, :size] + terms)
    ranked = tokens[:, None, :size].expand_as(order).gather(2, order)
    if size < tokens.shape[1]:
        behind = (-1, parents.shape[1], -1)
        ranked = torch.cat((ranked, tokens[:, None, size:].expand(behind)), dim=2)
        scores = torch.cat((scores, logits[:, None, size:].expand(behind)), dim=2)
    return Below(ranked, scores)


@dataclass
class SelectorTree:
    """A tree of N draft nodes on which heads' guesses are placed, each below its parent's token.

    It goes from depth to depth, for all nodes and requests of a depth at once. A node's rank is its
    place among the guesses, ranked below its parent's token.

    Attributes:
        selector: of the heads.
        levels: of the tree.
    """

    selector: Selector
    levels: Sequence[Level]

    def draft(self, logits: Tensor, tokens: Tensor, roots: Tensor) -> Tensor:
        """Return [B, N] int64, the token of each node.

        Args:
            logits: [K, B, C] of each head's guesses, the best first, scaled.
            tokens: [K, B, C] int64 tokens of the target's vocabulary.
            roots: [B] int64.
        """
        return self._place(logits, tokens, roots)[0]

    def probable(self, log_probs: Tensor, tokens: Tensor, roots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the guesses below each of the T nodes that have children, the root first.

        A selector's terms make some guesses more probable. The head's probability of all other
        tokens stays, and then everything is divided by the new sum.

        Args:
            log_probs: [K, B, C] float32 of each head's guesses, the best first.
            tokens, roots: as for `draft`.

        Returns:
            [T, B, C] float32 log-probabilities and [T, B, C] int64 tokens, in the selector's order
        """
        _, guessed = self._place(log_probs, tokens, roots)
        rest = (1 - log_probs.exp().sum(dim=-1)).clamp(min=0).log()  # [K, B]
        num_tables = [len(level.parents) for level in self.levels]
        rest = torch.cat([row.expand(num, -1) for row, num in zip(rest, num_tables, strict=False)])
        scores = torch.cat([below.scores for below in guessed], dim=1).transpose(0, 1)
        totals = torch.logaddexp(scores.logsumexp(dim=-1), rest)
        below_all = torch.cat([below.tokens for below in guessed], dim=1)
        return scores - totals[..., None], below_all.transpose(0, 1)

    def _place(self, logits: Tensor, tokens: Tensor, roots: Tensor) -> tuple[Tensor, list[Below]]:
        """Return the nodes' tokens, and for each level the guesses below its parents."""
        num_nodes = sum(len(level.nodes) for level in self.levels)
        drafted = tokens.new_empty(len(roots), 1 + num_nodes)
        drafted[:, 0] = roots
        guessed = []
        for head, level in enumerate(self.levels):
            above = drafted[:, level.parents]
            below = guess_below(self.selector, head, logits[head], tokens[head], above)
            drafted[:, level.nodes] = below.tokens[:, level.parent_places, level.ranks]
            guessed.append(below)
        return drafted[:, 1:], guessed
