"""Heads that run one after the other: each sees the tokens of the path that it continues.

A Medusa head guesses from the hidden state alone. A sequential head k also sees the root and the k
tokens below it, so its guesses differ from path to path, and a tree is drafted level by level: all
nodes of a level, and all requests, at the same time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_medusa.heads.checkpoint import HeadsSpec
from vllm_medusa.heads.hydra import HydraHeads
from vllm_medusa.heads.mlp_speculator import MlpSpeculator
from vllm_medusa.tree.layout import Level


class SequentialHeads(Protocol):
    """K heads with a state of each path; what a state holds is theirs to choose."""

    def first_state(self, hidden: Tensor) -> Tensor:
        """Return the states [N, S] of empty paths, from the target's final hidden states [N, H]."""

    def advance(self, head: int, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Go on by one token of each path.

        Args:
            head: k, from 0; the one that guesses what follows.
            states: [N, S] of the paths without the tokens, as head k - 1 has left them.
            tokens: [N] int64, the last token of each path; for head 0 the root.

        Returns:
            [N, S'] states with the tokens, and [N, F] features that the lm_head of head k reads
        """


def make_sequential(
    spec: HeadsSpec,
    tensors: Mapping[str, Tensor],
    num_heads: int,
    embed: Callable[[Tensor], Tensor] | None,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> SequentialHeads:
    """Build heads of a checkpoint, which are not trained.

    Args:
        spec: of all heads.
        tensors: canonical ones (`HeadsCheckpoint`), of the first heads at least.
        num_heads: heads that are needed.
        embed: from tokens [N] to the target's embeddings [N, E], for heads that read them.
        dtype: of the parameters.
        device: of the parameters.
    """
    if spec.kind == "mlp_speculator":
        speculator = MlpSpeculator(
            tensors,
            num_heads,
            spec.num_heads,
            scales_input=spec.scales_input,
            dtype=dtype,
            device=device,
        )
        return speculator.requires_grad_(False)
    assert embed is not None, "Hydra heads read the target's embedding"
    return HydraHeads.from_tensors(tensors, embed, dtype, device).requires_grad_(False)


def features_along(
    heads: SequentialHeads, num_heads: int, hidden: Tensor, following: Tensor
) -> Tensor:
    """Return what the lm_heads read along known texts.

    Args:
        heads: at least `num_heads` of them.
        num_heads: K.
        hidden: [N, H] states of the target.
        following: [N, K] int64, the tokens after each: the root, and what follows it.

    Returns:
        [K, N, F]
    """
    states, rows = heads.first_state(hidden), []
    for head in range(num_heads):
        states, features = heads.advance(head, states, following[:, head])
        rows.append(features)
    return torch.stack(rows)


#: From a head k and features [N, F] to its C best guesses for each: [N, C] scores and [N, C] int64
#: tokens, the best first.
Guess = Callable[[int, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SequentialTree:
    """A tree of N draft nodes which sequential heads fill level by level.

    A node's rank is its place among the guesses of its parent's path.

    Attributes:
        levels: of the tree, from depth 1.
        sources: for each level but the last, where the states of the next level's parents come
            from: their parents' places among the parents of this level.
    """

    levels: Sequence[Level]
    sources: Sequence[Tensor]

    @classmethod
    def of(cls, levels: Sequence[Level]) -> SequentialTree:
        """Find out which node goes on from which."""
        # Nodes and parents of a level are in ascending order.
        sources = [
            level.parent_places[torch.searchsorted(level.nodes, below.parents)]
            for level, below in itertools.pairwise(levels)
        ]
        return cls(levels, sources)

    def draft(self, heads: SequentialHeads, hidden: Tensor, roots: Tensor, guess: Guess) -> Tensor:
        """Return [B, N] int64, the token of each node.

        Args:
            heads: as many as the tree is deep, or more.
            hidden: [B, H] states of the target.
            roots: [B] int64 tokens after them.
            guess: for the heads.
        """
        return self._place(heads, hidden, roots, guess)[0]

    def probable(
        self,
        heads: SequentialHeads,
        hidden: Tensor,
        roots: Tensor,
        guess: Guess,
        width: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the guesses below each of the T nodes that have children, the root first.

        Args:
            heads: as for `draft`.
            hidden: as for `draft`.
            roots: as for `draft`.
            guess: for the heads, with log-probabilities as scores.
            width: most nodes of a level that each request goes on from, the most probable; None:
                all. The guesses below the others have the score minus infinity.

        Returns:
            [T, B, C] scores and [T, B, C] int64 tokens
        """
        _, scores, tokens = self._place(heads, hidden, roots, guess, width)
        return torch.cat(scores, dim=1).transpose(0, 1), torch.cat(tokens, dim=1).transpose(0, 1)

    def _place(
        self,
        heads: SequentialHeads,
        hidden: Tensor,
        roots: Tensor,
        guess: Guess,
        width: int | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The nodes' tokens, and for each level [B, m, C] scores and tokens below its parents."""
        num_requests, device = len(roots), hidden.device
        num_nodes = sum(len(level.nodes) for level in self.levels)
        drafted = torch.empty(num_requests, 1 + num_nodes, dtype=torch.int64, device=device)
        drafted[:, 0] = roots
        likelihood = torch.zeros(num_requests, 1 + num_nodes, device=device)
        states = heads.first_state(hidden)[:, None]
        # [B, m] the row among the states of what each of a level's parents goes on from.
        rows = torch.zeros(num_requests, 1, dtype=torch.int64, device=device)
        all_scores, all_tokens = [], []
        for head, level in enumerate(self.levels):
            above, size, chosen = drafted[:, level.parents], len(level.parents), None
            if width is not None and width < size:
                chosen = likelihood[:, level.parents].topk(width).indices
                above, rows = above.gather(1, chosen), rows.gather(1, chosen)
            states = states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))
            new, features = heads.advance(head, states.flatten(0, 1), above.flatten())
            states, scores, tokens = (
                part.view(*above.shape, -1) for part in (new, *guess(head, features))
            )
            rows = torch.arange(above.shape[1], device=device).expand_as(above)
            if chosen is not None:
                rows = _spread(rows[..., None], chosen, size, 0)[..., 0]
                tokens = _spread(tokens, chosen, size, 0)
                scores = _spread(scores, chosen, size, -torch.inf)
            cells = (slice(None), level.parent_places, level.ranks)
            drafted[:, level.nodes] = tokens[cells]
            if width is not None:
                reached = likelihood[:, level.parents]
                scores = scores.masked_fill(reached[..., None].isneginf(), -torch.inf)
                likelihood[:, level.nodes] = reached[:, level.parent_places] + scores[cells]
            all_scores.append(scores)
            all_tokens.append(tokens)
            if head < len(self.sources):
                rows = rows[:, self.sources[head]]
        return drafted[:, 1:], all_scores, all_tokens


def _spread(part: Tensor, places: Tensor, size: int, fill: float) -> Tensor:
    """[B, w, C] values at their places [B, w] of [B, size, C]; the others are filled."""
    full = part.new_full((len(part), size, part.shape[-1]), fill)
    return full.scatter_(1, places[..., None].expand_as(part), part)
