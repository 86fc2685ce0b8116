"""How well a target predicts the held-out answers: what joint training changes in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vllm_medusa.data.rows import Row
from vllm_medusa.target.frozen import FrozenTarget, chunk_size
from vllm_medusa.training.packing import build_batch


@torch.no_grad()
def measure_target(
    target: FrozenTarget, rows: Sequence[Row], batch_tokens: int
) -> dict[str, float]:
    """Measure a target on the answers of rows.

    Args:
        target: in the dtype to compute in.
        rows: with answers.
        batch_tokens: of one forward pass, with the padding; a longer row has one of its own.

    Returns:
        `perplexity` of the answers' tokens, and `top_1`, the share of them that the target finds
        likeliest.
    """
    nats, num_top, count = 0.0, 0, 0
    device = target.weight.device
    size = chunk_size(target.vocab_size, device)
    longest = max(len(row.token_ids) for row in rows)
    per_batch = max(1, batch_tokens // longest)
    for start in range(0, len(rows), per_batch):
        sequences = [[row] for row in rows[start : start + per_batch]]
        batch = build_batch(sequences, longest).to(device)
        hidden = target.hidden(batch.tokens, batch.position_ids).flatten(0, 1)
        tokens = batch.tokens.flatten()
        for learnt in torch.split(batch.learnt, size):
            logits, labels = target.logits(hidden[learnt]).float(), tokens[learnt + 1]
            nats += F.cross_entropy(logits, labels, reduction="sum").item()
            num_top += int((logits.argmax(dim=-1) == labels).sum())
            count += len(learnt)
    return {"perplexity": math.exp(nats / count), "top_1": num_top / count}
