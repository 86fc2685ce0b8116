"""Heads that run one after the other: each sees the tokens of the path that it continues.

A Medusa head guesses from the hidden state alone. A sequential head k also sees the root and the k
tokens below it, so its guesses differ from path to path, and a tree is drafted level by level: all
nodes of a level, and all requests, at the same time.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


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
