"""The loss of backbone and heads together, over one batch (Medusa-2; paper, section 2.2.2).

The backbone's gradient is that of ``L_LM + lambda_0 * L_Medusa-1``. The heads' gradient is that of
L_Medusa-1 alone: AdamW and Muon do not see a factor on it, so lambda_0 is how much the heads move
the backbone, and nothing else changes for them when it begins to be trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_medusa.target.frozen import chunk_size
from vllm_medusa.training.backbone import Backbone
from vllm_medusa.training.loss import accumulate_gradients, into_gradient
from vllm_medusa.training.model import TrainedHeads
from vllm_medusa.training.packing import Batch
from vllm_medusa.training.settings import TrainSettings


def accumulate_joint_gradients(
    heads: TrainedHeads,
    backbone: Backbone,
    batch: Batch,
    settings: TrainSettings,
    scale: float,
    *,
    heads_weight: float,
    noise: int,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Add one batch's gradient to the parameters of the heads and of the backbone.

    An lm_head or an embedding that the heads share with the backbone gets no gradient from them;
    what the heads learn reaches the backbone through its hidden states.

    Args:
        heads: to be trained.
        backbone: to be trained.
        batch: on the backbone's device.
        settings: which losses.
        scale: one over the number of learnt tokens of the whole step.
        heads_weight: lambda_0.
        noise: seed of the dropout.
        chunk: C, predicted tokens at once; chosen by the vocabulary if None.

    Returns:
        [K] float32, as `accumulate_gradients`; and a scalar, the backbone's scaled loss. KL is
        counted with the original target's entropy: it is the cross entropy to its distribution.
    """
    originals = backbone.original_states(batch) if settings.backbone_loss == "kl" else None
    states = backbone.states(batch, noise)
    leaf = states.detach().requires_grad_(True)
    losses = accumulate_gradients(
        heads, backbone.target, batch, settings, scale, chunk, hidden=leaf
    )
    assert leaf.grad is not None
    gradient = leaf.grad * heads_weight
    loss = torch.zeros((), device=states.device)
    size = chunk or chunk_size(backbone.target.vocab_size, states.device)
    tokens = batch.tokens.flatten()
    for learnt in torch.split(batch.learnt, size):
        wanted = None
        if originals is not None:
            logits = backbone.original_logits(originals[learnt])
            wanted = torch.softmax(logits, dim=-1, dtype=torch.float32)
        part = leaf.detach()[learnt].requires_grad_(True)
        logits = backbone.target.project(part)
        loss += scale * into_gradient(logits.detach(), tokens[learnt + 1], wanted, scale)
        torch.autograd.backward(logits, logits.detach())
        assert part.grad is not None
        gradient[learnt] += part.grad
    torch.autograd.backward(states, gradient)
    return losses, loss
