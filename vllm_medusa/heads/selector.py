"""The selector: a head's best guesses, ranked again by the token that they would follow.

A Medusa head guesses without knowing what the heads before it guess. The selector adds to the
logit of each of a head's best guesses a term of low rank of the guess and its parent, the token of
the depth above (for the first head the root). So a node's token depends on its parent's, as with
sequential heads (Hydra, arXiv 2402.05109), but all heads still run at once and no lm_head runs for
a node.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vllm_medusa.tree.layout import TreeLayout

#: A head's guesses that are ranked again; those behind them stay where they are.
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
        """Exchange the logits of a head's best guesses so that their order is the selector's.

        Args:
            logits: [N, V] of the target's vocabulary.
            parents: [N] int64, the token that the guess would follow; -1, which is none, will do.
            head: k.
            scale: factor on the logits, positive.

        Returns:
            [N, V]
        """
        values, tokens = logits.topk(min(NUM_CANDIDATES, logits.shape[1]), dim=-1)
        terms = self.terms(parents.clamp(min=0)[:, None], tokens, head).squeeze(1)
        order = best_first(values.float() * scale + terms)
        return logits.scatter(1, tokens.gather(1, order), values)


def best_first(scores: Tensor) -> Tensor:
    """Return the order of scores [..., C] from the largest on; of equal ones the first is first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def draft_tokens(
    selector: Selector, layout: TreeLayout, logits: Tensor, tokens: Tensor, roots: Tensor
) -> Tensor:
    """Place the heads' guesses on a tree, each below the parent that it follows.

    Goes from depth to depth, each at once for all nodes and requests: a node's rank is its place
    among the guesses as they are ranked below its parent's token.

    Args:
        selector: of the heads.
        layout: of the tree, N draft nodes.
        logits: [K, B, C] of each head's guesses, the best first, scaled.
        tokens: [K, B, C] int64 tokens of the target's vocabulary.
        roots: [B] int64.

    Returns:
        [B, N] int64 token of each draft node.
    """
    size = min(NUM_CANDIDATES, tokens.shape[2])
    drafted = tokens.new_empty(len(roots), len(layout.parents) + 1)
    drafted[:, 0] = roots
    for head, level in enumerate(layout.levels):
        above = drafted[:, level.parents]
        candidates = tokens[head, :, :size]
        scores = logits[head, :, None, :size] + selector.terms(above, candidates, head)
        ranked = candidates[:, None].expand_as(scores).gather(2, best_first(scores))
        behind = tokens[head, :, None, size:].expand(-1, len(level.parents), -1)
        ranked = torch.cat((ranked, behind), dim=2)
        drafted[:, level.nodes] = ranked[:, level.parent_places, level.ranks]
    return drafted[:, 1:]
