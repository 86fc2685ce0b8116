"""Packing rows (here: documents) into sequences of equal length, and what the loss looks at.

The sequences of a step depend only on the seed and the step's number, so a run that was killed
continues with exactly the batches that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_medusa.data.rows import Row

# Number of documents that are packed (best fit) at a time: enough for little padding, few enough
# that the order stays random.
_WINDOW = 512


@dataclass(frozen=True)
class Batch:
    """Packed sequences, with B sequences of S tokens.

    Attributes:
        tokens: [B, S] int64 token ids, zero where padded.
        position_ids: [B, S] int64, from 0 in every document and in the padding.
        learnt: [U] int64 flat indices u of positions whose *next* token, u + 1, is an answer token
            of the same document: the target's distribution there is what the heads of the
            positions before learn.
        depth: [U] int64 position of u in its document: head k can predict token u + 1 from
            position u - 1 - k if that is at least 0.
    """

    tokens: Tensor
    position_ids: Tensor
    learnt: Tensor
    depth: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        return Batch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def pack_epoch(lengths: Sequence[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Pack documents into sequences, all of them once, in random order.

    Args:
        lengths: of the documents, none above `size`.
        size: S, the length of a sequence.
        rng: of the order.

    Returns:
        for each sequence its documents' indices.
    """
    sequences: list[list[int]] = []
    order = rng.permutation(len(lengths))
    for start in range(0, len(order), _WINDOW):
        window = sorted(order[start : start + _WINDOW].tolist(), key=lambda i: -lengths[i])
        sequences += _best_fit(window, lengths, size)
    return [sequences[i] for i in rng.permutation(len(sequences)).tolist()]


def _best_fit(window: list[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Best-fit decreasing: each document into the fullest sequence that has room for it."""
    bins: list[list[int]] = []
    room = np.zeros(0, dtype=np.int64)
    for index in window:
        fits = np.flatnonzero(room >= lengths[index])
        if len(fits):
            chosen = int(fits[room[fits].argmin()])
        else:
            chosen = len(bins)
            bins.append([])
            room = np.append(room, size)
        bins[chosen].append(index)
        room[chosen] -= lengths[index]
    return bins


class Batches:
    """The endless stream of packed batches, epoch after epoch.

    Args:
        documents: to learn from.
        batch_tokens: tokens per batch, at most; a longer document is a batch of its own length.
        seed: of the order.

    Attributes:
        sequence_length: S, the longest document's length.
        num_sequences: B, sequences per batch.
    """

    def __init__(self, documents: list[Row], batch_tokens: int, seed: int) -> None:
        self._documents = documents
        self._lengths = [len(document.token_ids) for document in documents]
        self._seed = seed
        self.sequence_length = max(self._lengths)
        self.num_sequences = max(1, batch_tokens // self.sequence_length)

    def epoch(self, number: int) -> list[list[int]]:
        """Return the sequences of one epoch, each as its documents' indices."""
        rng = np.random.default_rng([self._seed, number])
        return pack_epoch(self._lengths, self.sequence_length, rng)

    def from_batch(self, first: int) -> Iterator[list[list[int]]]:
        """Yield the sequences of batch `first` (from 0), of the next one, and so on for ever."""
        sequences = islice(self._sequences(), first * self.num_sequences, None)
        while True:
            yield list(islice(sequences, self.num_sequences))

    def num_learnt(self, sequences: list[list[int]]) -> int:
        """Count the answer tokens that the loss looks at in a batch."""
        return sum(self._documents[i].num_learnt for sequence in sequences for i in sequence)

    def _sequences(self) -> Iterator[list[int]]:
        number = 0
        while True:
            yield from self.epoch(number)
            number += 1

    def build(self, sequences: list[list[int]]) -> Batch:
        """Build the tensors of one batch."""
        return build_batch(
            [[self._documents[index] for index in sequence] for sequence in sequences],
            self.sequence_length,
        )


def build_batch(sequences: list[list[Row]], size: int) -> Batch:
    """Build the tensors of packed sequences, each padded to `size` tokens."""
    tokens = np.zeros((len(sequences), size), dtype=np.int64)
    position_ids = np.zeros_like(tokens)
    is_learnt: NDArray[np.bool_] = np.zeros(tokens.shape, dtype=np.bool_)
    for row, sequence in enumerate(sequences):
        end = 0
        for document in sequence:
            start, end = end, end + len(document.token_ids)
            tokens[row, start:end] = document.token_ids
            position_ids[row, start:end] = np.arange(end - start)
            is_learnt[row, start : end - 1] = document.loss_mask[1:]
        position_ids[row, end:] = np.arange(size - end)
    learnt = np.flatnonzero(is_learnt)
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(position_ids),
        torch.from_numpy(learnt),
        torch.from_numpy(position_ids.reshape(-1)[learnt]),
    )
