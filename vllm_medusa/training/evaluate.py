"""Measuring heads on held-out rows: the ranks that they gave the tokens that came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.acceptance.paths import (
    RANK_CAP,
    Ranks,
    best_paths,
    head_accuracy,
    loop_start,
    position_average,
    simulate,
)
from vllm_medusa.data.documents import Document, answers_of
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.loss import chunk_size
from vllm_medusa.training.model import TrainableHeads
from vllm_medusa.training.packing import build_batch, pack_epoch
from vllm_medusa.tree.draft_tree import TreePath

TREE_SIZES = (8, 16, 24, 32, 48, 64)
#: Heads are chosen by the acceptance length that the best tree of so many nodes can be expected to
#: have: a size that is served.
CHOSEN_BY = 32


@dataclass(frozen=True)
class Continuation:
    """One answer of a held-out row.

    Attributes:
        ranks: [positions, heads], as `vllm_medusa.acceptance.paths` says.
        num_before_loop: positions whose guesses end before the answer begins to loop.
    """

    ranks: Ranks
    num_before_loop: int


@torch.no_grad()
def measure(
    heads: TrainableHeads, target: FrozenTarget, documents: Sequence[Document], batch_tokens: int
) -> list[Continuation]:
    """Return the ranks that the heads give the tokens of each held-out answer.

    Args:
        heads: in training.
        target: frozen.
        documents: held-out rows.
        batch_tokens: tokens per forward pass, at most.
    """
    lengths = [len(document.tokens) for document in documents]
    size = max(lengths)
    sequences = pack_epoch(lengths, size, np.random.default_rng(0))
    per_batch = max(1, batch_tokens // size)
    found: dict[int, list[Continuation]] = {}
    for start in range(0, len(sequences), per_batch):
        chosen = sequences[start : start + per_batch]
        packed = [[documents[index] for index in sequence] for sequence in chosen]
        batch = build_batch(packed, size).to(target.weight.device)
        ranks = _ranks(heads, target, batch.tokens, batch.position_ids, batch.learnt)
        for row, sequence in enumerate(chosen):
            offset = row * size
            for index in sequence:
                found[index] = _continuations(documents[index], ranks[offset:])
                offset += lengths[index]
    return [item for index in range(len(documents)) for item in found[index]]


def _continuations(document: Document, ranks: Ranks) -> list[Continuation]:
    """Cut the ranks of each answer out of those of a row: rank of token u + 1 at [u, head]."""
    num_heads = ranks.shape[1]
    result = []
    for start, stop in answers_of(document):
        # The step at position p has answer token p as its root; head k guesses p + 1 + k.
        num_positions = stop - start
        table = np.full((num_positions, num_heads), RANK_CAP, dtype=np.int64)
        for k in range(num_heads):
            right = ranks[start + k : stop - 1, k]
            table[: len(right), k] = right
        before_loop = loop_start(document.tokens[start:stop].tolist()) - num_heads
        if before_loop + num_heads == num_positions:
            before_loop = num_positions
        result.append(Continuation(table, max(0, before_loop)))
    return result


def _ranks(
    heads: TrainableHeads,
    target: FrozenTarget,
    tokens: Tensor,
    position_ids: Tensor,
    learnt: Tensor,
) -> Ranks:
    """Return [B * S, K]: at u the rank that head k, at u - 1 - k, gave token u + 1."""
    hidden = target.hidden(tokens, position_ids).flatten(0, 1)
    features = heads.features(hidden)
    depth = position_ids.flatten()
    labels = tokens.flatten()
    ranks = torch.full((len(hidden), heads.num_heads), RANK_CAP, device=hidden.device)
    for chunk in torch.split(learnt, chunk_size(target.vocab_size, hidden.device)):
        for k in range(heads.num_heads):
            known = chunk[depth[chunk] > k]
            logits = heads.logits(features[k, known - 1 - k], k)
            ranks[known, k] = rank_of(logits, labels[known + 1])
    table: Ranks = ranks.cpu().numpy()
    return table


def rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the tokens ranked above each label: [N, V], [N] to [N] int64, capped at `RANK_CAP`."""
    above = logits > logits.gather(-1, labels[:, None])
    return above.sum(dim=-1).clamp_(max=RANK_CAP)


def expected_acceptance(continuations: Sequence[Continuation]) -> float:
    """Return the acceptance length to choose heads by, see `CHOSEN_BY`."""
    ranks = [item.ranks for item in continuations]
    return position_average(ranks, best_paths(ranks, CHOSEN_BY))


def summary(continuations: Sequence[Continuation], paths: Sequence[TreePath]) -> dict[str, Any]:
    """Return accuracy and acceptance lengths, with and without looping text.

    Args:
        continuations: of held-out answers.
        paths: the most probable paths, most probable first.
    """
    cut = [item.ranks[: item.num_before_loop] for item in continuations]
    return {
        "with_loops": _figures([item.ranks for item in continuations], paths),
        "without_loops": _figures(cut, paths),
    }


def _figures(ranks: list[Ranks], paths: Sequence[TreePath]) -> dict[str, Any]:
    num_heads = ranks[0].shape[1]
    chain = [(0,) * depth for depth in range(1, num_heads + 1)]
    lengths = {f"chain of {num_heads}": simulate(ranks, chain)}
    for size in TREE_SIZES:
        if size <= len(paths):  # so many were ever right
            lengths[f"tree of {size}"] = simulate(ranks, paths[:size])
    accuracy = head_accuracy(ranks)
    return {
        "positions": sum(map(len, ranks)),
        "accuracy": {f"top-{top}": [round(x, 4) for x in accuracy[top]] for top in accuracy},
        "acceptance_length": {name: round(length, 4) for name, length in lengths.items()},
    }
