"""Slow, obvious recurrent heads: the text grows by what the head makes of it, token by token."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.oracles.prefix import in_context


def features(
    tensors: Mapping[str, Tensor],
    hidden: Tensor,
    following: Tensor,
    known: Collection[int],
    drafted: Sequence[Tensor] = (),
) -> Tensor:
    """[H] after the drafted tokens, from the end of a text.

    `hidden` [S, H] and `following` [S, E] are the text's hidden states and the embeddings of the
    tokens after them, `known` the positions that can be read, `drafted` the embeddings [E] of the
    tokens after these.
    """
    known = set(known)
    made = _made(tensors, hidden, following, known)
    for token in drafted:
        known.add(len(hidden))
        hidden, following = torch.cat((hidden, made[None])), torch.cat((following, token[None]))
        made = _made(tensors, hidden, following, known)
    return made


def _made(
    tensors: Mapping[str, Tensor], hidden: Tensor, following: Tensor, known: Collection[int]
) -> Tensor:
    last = len(hidden) - 1
    made = in_context(tensors, hidden, following, last, known)
    made = made + tensors["gated.embedded"] @ following[last]
    for (gate, up), down in zip(tensors["gated.gate_up"], tensors["gated.down"], strict=True):
        scaled = made / (made @ made / len(made) + 1e-6).sqrt()
        made = made + down @ (F.silu(gate @ scaled) * (up @ scaled))
    return made
