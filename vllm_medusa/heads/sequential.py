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

    A node's rank is its place among the guesses of its parent's path. T nodes have children, the
    root first, and each of them has a row in tables. A row more, the last one, is that of no node.

    Attributes:
        sizes: number of rows of each level, from the root's on.
        rows: [N] int64, the row of each node's parent.
        ranks: [N] int64.
        children: [T + 1, R] int64, the row of the child of each rank; T if there is none.
    """

    sizes: Sequence[int]
    rows: Tensor
    ranks: Tensor
    children: Tensor

    @classmethod
    def of(cls, levels: Sequence[Level]) -> SequentialTree:
        """Find out which node goes on from which; `levels` are those from depth 1."""
        sizes = [len(level.parents) for level in levels]
        starts = itertools.accumulate(sizes, initial=0)
        nodes, ranks = (
            torch.cat([getattr(level, name) for level in levels]) for name in ("nodes", "ranks")
        )
        rows = torch.cat(
            [start + level.parent_places for start, level in zip(starts, levels, strict=False)]
        )
        num_rows, num_ranks = sum(sizes), int(ranks.max()) + 1
        row_of = nodes.new_full((1 + len(nodes),), num_rows)
        row_of[torch.cat([level.parents for level in levels])] = torch.arange(
            num_rows, device=nodes.device
        )
        children = nodes.new_full((num_rows + 1, num_ranks), num_rows)
        children[rows, ranks] = row_of[nodes]
        by_node = nodes.argsort()
        return cls(sizes, rows[by_node], ranks[by_node], children)

    def draft(self, heads: SequentialHeads, hidden: Tensor, roots: Tensor, guess: Guess) -> Tensor:
        """Return [B, N] int64, the token of each node.

        Args:
            heads: as many as the tree is deep, or more.
            hidden: [B, H] states of the target.
            roots: [B] int64 tokens after them.
            guess: for the heads.
        """
        return self._guesses(heads, hidden, roots, guess)[1][:, self.rows, self.ranks]

    def probable(
        self,
        heads: SequentialHeads,
        hidden: Tensor,
        roots: Tensor,
        guess: Guess,
        width: int | None = None,
        num_levels: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the guesses below each of the T nodes that have children, the root first.

        Args:
            heads: as for `draft`.
            hidden: as for `draft`.
            roots: as for `draft`.
            guess: for the heads, with log-probabilities as scores.
            width: most nodes of a level that each request goes on from, the most probable; None:
                all. The guesses below the others have the score minus infinity.
            num_levels: levels that run, as for `width`; None: all.

        Returns:
            [T, B, C] scores and [T, B, C] int64 tokens
        """
        scores, tokens = self._guesses(heads, hidden, roots, guess, width, num_levels)
        return scores.transpose(0, 1), tokens.transpose(0, 1)

    def _guesses(
        self,
        heads: SequentialHeads,
        hidden: Tensor,
        roots: Tensor,
        guess: Guess,
        width: int | None = None,
        num_levels: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, T, C] scores and tokens below each row.

        A level is w nodes of each request, those that the heads go on from.
        """
        nowhere, num_ranks = len(self.children) - 1, self.children.shape[1]
        states, tokens = heads.first_state(hidden), roots[:, None]
        # [B, w] the rows of a level, and how likely the paths to them are.
        rows, likelihood = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.float32)
        levels: list[tuple[Tensor, Tensor, Tensor]] = []
        for head, size in enumerate(self.sizes[:num_levels]):
            if head > 0:
                children = self.children[rows]
                _, scores, guesses = levels[-1]
                reached = likelihood[..., None] + scores[..., :num_ranks]
                reached = reached.masked_fill(children == nowhere, -torch.inf).flatten(1)
                likelihood, chosen = reached.topk(size if width is None else min(size, width))
                rows = children.flatten(1).gather(1, chosen)
                tokens = guesses[..., :num_ranks].flatten(1).gather(1, chosen)
                states = states.view(*guesses.shape[:2], -1)
                states = _gathered(states, chosen // num_ranks).flatten(0, 1)
            states, features = heads.advance(head, states, tokens.flatten())
            scores, guesses = (part.view(*rows.shape, -1) for part in guess(head, features))
            levels.append((rows, scores, guesses))
        places, scores, guesses = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        return (
            _placed(scores, places, nowhere, -torch.inf),
            _placed(guesses, places, nowhere, 0),
        )


def _gathered(part: Tensor, places: Tensor) -> Tensor:
    """[B, w, S] rows of [B, v, S] at places [B, w]."""
    return part.gather(1, places[..., None].expand(-1, -1, part.shape[-1]))


def _placed(part: Tensor, places: Tensor, size: int, fill: float) -> Tensor:
    """[B, w, C] rows at their places [B, w] of [B, size, C]; the others are filled.

    Rows at the place `size` are left out.
    """
    full = part.new_full((len(part), size + 1, part.shape[-1]), fill)
    return full.scatter_(1, places[..., None].expand_as(part), part)[:, :size]
