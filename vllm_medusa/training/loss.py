"""The loss of all heads over one batch, in chunks that never hold the whole batch's logits.

For 4 heads, 4,096 positions and a vocabulary of 128,000, the logits alone would take 8 GB in
float32, and as much again for their gradient. Here a chunk of C predicted tokens at a time gets
the target's distribution [C, V] once for all heads; then, head by head, the logits [C, V] become
their own gradient in place and are multiplied back onto the features. The blocks' backward pass
runs once at the end, from the features' gradient.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.target.frozen import FrozenTarget, chunk_size
from vllm_medusa.training.model import TrainableHeads
from vllm_medusa.training.packing import Batch
from vllm_medusa.training.settings import TrainSettings


def accumulate_gradients(
    heads: TrainableHeads,
    target: FrozenTarget,
    batch: Batch,
    settings: TrainSettings,
    scale: float,
    chunk: int | None = None,
) -> Tensor:
    """Add one batch's gradient to the heads' parameters.

    The gradient is that of ``scale * sum over heads k of decay^k * sum over learnt tokens of the
    head's loss`` (paper, section 2.2.1), where a token counts for a head if the position that the
    head would predict it from lies in the same document.

    Args:
        heads: to be trained.
        target: frozen.
        batch: on the target's device.
        settings: which loss.
        scale: one over the number of learnt tokens of the whole step.
        chunk: C; chosen by the vocabulary if None.

    Returns:
        [K] float32, each head's scaled loss, without its decay. KL is counted without the target's
        entropy, which no head changes: it is the cross entropy to the target's distribution.
    """
    hidden = target.hidden(batch.tokens, batch.position_ids).flatten(0, 1)
    features = heads.features(hidden)
    values = features.detach()
    gradient = torch.zeros_like(values)
    losses = torch.zeros(heads.num_heads, device=hidden.device)
    chunk = chunk or chunk_size(target.vocab_size, hidden.device)
    labels = batch.tokens.flatten()
    chunks = zip(torch.split(batch.learnt, chunk), torch.split(batch.depth, chunk), strict=True)
    for learnt, depth in chunks:
        label = labels[learnt + 1]
        wanted = None
        if settings.loss == "kl":
            wanted = _softmax(target.logits(hidden[learnt]) / settings.kl_temperature)
        for k in range(heads.num_heads):
            known = depth > k
            position = (learnt - 1 - k)[known]
            target_rows = wanted if wanted is None or known.all() else wanted[known]
            weight = scale * settings.decay**k
            loss, row_gradient = _head_backward(
                heads, k, values[k, position], label[known], target_rows, weight
            )
            gradient[k, position] = row_gradient
            losses[k] += loss * scale
    torch.autograd.backward(features, gradient)
    return losses


def _head_backward(
    heads: TrainableHeads,
    head: int,
    features: Tensor,
    labels: Tensor,
    wanted: Tensor | None,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """Go forward and back through one head's lm_head for one chunk of predicted tokens.

    Args:
        heads: whose lm_heads get their gradient, where they are trained.
        head: k.
        features: [C, H] of the positions that predict.
        labels: [C] int64 tokens to predict, for cross entropy.
        wanted: [C, V] float32, the target's distribution, for KL; None for cross entropy.
        weight: factor on the gradient.

    Returns:
        the summed loss (a scalar), and the gradient [C, H] of ``weight * loss`` by the features.
    """
    features.requires_grad_(True)
    logits = heads.logits(features, head)
    loss = _into_gradient(logits.detach(), labels, wanted, weight)
    torch.autograd.backward(logits, logits.detach())
    assert features.grad is not None
    return loss, features.grad


def draw_learnt(batch: Batch, count: int, seed: list[int]) -> Batch:
    """Return the batch with `count` of its learnt tokens, drawn without replacement, in order."""
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.permutation(len(batch.learnt))[:count])
    return replace(batch, learnt=batch.learnt[kept], depth=batch.depth[kept])


@torch.no_grad()
def _into_gradient(logits: Tensor, labels: Tensor, wanted: Tensor | None, weight: float) -> Tensor:
    """Replace logits by the gradient of ``weight * cross entropy``; return the cross entropy.

    The gradient is softmax less the wanted distribution, in float32 whatever the logits' dtype.
    """
    exact = logits.float()
    softmax = _softmax(exact)
    # log(sum(exp)) from the largest probability, which never underflows: `exp` of a log_softmax is
    # full of denormal numbers, at which a CPU is ten times slower.
    log_sum_exp = exact.amax(dim=-1) - softmax.amax(dim=-1).log()
    if wanted is None:
        index = labels[:, None]
        loss = (log_sum_exp - exact.gather(-1, index).squeeze(-1)).sum()
        softmax.scatter_add_(-1, index, softmax.new_full(index.shape, -1.0))
    else:
        loss = (log_sum_exp - torch.linalg.vecdot(wanted, exact)).sum()
        softmax.sub_(wanted)
    torch.mul(softmax, weight, out=logits)
    return loss


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1, dtype=torch.float32)
