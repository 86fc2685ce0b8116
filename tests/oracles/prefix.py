"""Slow, obvious prefix attention: one position and one attention head at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def in_context(
    tensors: Mapping[str, Tensor],
    hidden: Tensor,
    following: Tensor,
    position: int,
    known: Collection[int],
) -> Tensor:
    """[H] at one position of a text.

    `hidden` [S, H] and `following` [S, E] are those of the whole text, `known` the positions that
    can be read.
    """
    num_heads, window = tensors["prefix.bias"].shape
    size = len(tensors["prefix.query"]) // num_heads

    def read(matrix: Tensor, at: int) -> Tensor:
        parts = (hidden[at], following[at])
        return matrix @ torch.cat([x / (x @ x / len(x) + 1e-6).sqrt() for x in parts])

    places = [p for p in range(max(0, position - window + 1), position + 1) if p in known]
    found = []
    for head in range(num_heads):
        rows = slice(head * size, (head + 1) * size)
        query = read(tensors["prefix.query"][rows], position)
        keys, values = tensors["prefix.key_value"][:, rows]
        scores = [
            query @ read(keys, p) / math.sqrt(size) + tensors["prefix.bias"][head, position - p]
            for p in places
        ]
        weights = torch.stack(scores).softmax(dim=0)
        found.append(sum(w * read(values, p) for w, p in zip(weights, places, strict=True)))
    return hidden[position] + tensors["prefix.output"] @ torch.cat(found)
