"""The loss of all heads over one batch, in chunks that never hold the whole batch's logits.

For 4 heads, 4,096 positions and a vocabulary of 128,000, the logits alone would take 8 GB in
float32, and as much again for their gradient. Here a chunk of C predicted tokens at a time gets
the target's distribution [C, V] once for all heads; then, head by head, the logits [C, V] become
their own gradient in place and are multiplied back onto the features. The blocks' backward pass
runs once at the end, from the features' gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.target.frozen import FrozenTarget, chunk_size
from vllm_medusa.training.model import TrainedHeads
from vllm_medusa.training.packing import Batch
from vllm_medusa.training.selector_loss import SelectorLoss
from vllm_medusa.training.settings import TrainSettings

#: The two distributions of one token are taken to have no less in common.
_MIN_ACCEPTANCE = 1e-30


def accumulate_gradients(
    heads: TrainedHeads,
    target: FrozenTarget,
    batch: Batch,
    settings: TrainSettings,
    scale: float,
    chunk: int | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Add one batch's gradient to the heads' parameters.

    The gradient is that of ``scale * sum over heads k of decay^k * sum over learnt tokens of the
    head's loss`` (paper, section 2.2.1), where a token counts for a head if the position that the
    head would predict it from lies in the same document. A selector learns from the same tokens; to
    a recurrent head's loss comes its distance (`_add_distance`).

    Args:
        heads: to be trained.
        target: frozen.
        batch: on the target's device.
        settings: which loss.
        scale: one over the number of learnt tokens of the whole step.
        chunk: C; chosen by the vocabulary if None.
        hidden: [positions, H], the target's states, if they are there; a leaf gets its gradient.

    Returns:
        [K] float32, each head's scaled loss, without its decay and the distance; the selector's if
        it is trained alone. KL is counted without the target's entropy, which no head changes: it
        is the cross entropy to the target's distribution.
    """
    if hidden is None:
        hidden = target.hidden(batch.tokens, batch.position_ids).flatten(0, 1)
    # Beyond a document's end they are wrong; no head learns from positions that see such tokens.
    tokens = batch.tokens.flatten()
    following = torch.stack([tokens.roll(-1 - k) for k in range(heads.num_heads)], dim=1)
    states = hidden.view(*batch.tokens.shape, -1)
    states = heads.in_context(states, batch.tokens, batch.position_ids)
    features = heads.features(states.flatten(0, 1), following)
    values = features.detach()
    gradient = torch.zeros_like(values) if features.requires_grad else None
    losses = torch.zeros(heads.num_heads, device=hidden.device)
    selector = heads.selector
    selector_loss = None if selector is None else SelectorLoss(selector, heads.logit_scale)
    for k, position, rows in _chunks(heads, target, batch, settings, hidden, values, chunk):
        if gradient is None:
            _add_guesses(selector_loss, k, heads.logits(rows.features, k), rows)
            continue
        weight = scale * settings.decay**k
        loss, gradient[k, position] = _head_backward(
            heads, k, rows, weight, selector_loss, maximizes_acceptance=settings.loss == "lk"
        )
        losses[k] += loss * scale
    if gradient is not None:
        _add_distance(gradient, values, hidden, batch, settings, scale)
        torch.autograd.backward(features, gradient)
    if selector_loss is None:
        return losses
    of_selector = selector_loss.backward(scale, settings.decay)
    return losses if gradient is not None else of_selector


def _add_distance(
    gradient: Tensor,
    features: Tensor,
    hidden: Tensor,
    batch: Batch,
    settings: TrainSettings,
    scale: float,
) -> None:
    """Add the gradient of the distance between features [K, N, H] and hidden states [N, H].

    It is the smooth L1 distance to the state before the predicted token, the mean over H, as in
    EAGLE (arXiv 2401.15077, section 4.2).
    """
    if not settings.weight_of_features:
        return
    for k, of_head in enumerate(gradient):
        wanted = batch.learnt[batch.depth > k]
        position = wanted - 1 - k
        distance = features[k, position].float() - hidden[wanted].float()
        weight = settings.weight_of_features * scale * settings.decay**k / hidden.shape[1]
        of_head.index_add_(0, position, (weight * distance.clamp(-1, 1)).to(of_head.dtype))


@dataclass(frozen=True)
class _Rows:
    """C predicted tokens of one head.

    Attributes:
        features: [C, H] of the positions that predict.
        parents: [C] int64 tokens before the predicted ones.
        labels: [C] int64 tokens to predict.
        wanted: [C, V] float32, the target's distribution; None for cross entropy.
    """

    features: Tensor
    parents: Tensor
    labels: Tensor
    wanted: Tensor | None


def _chunks(
    heads: TrainedHeads,
    target: FrozenTarget,
    batch: Batch,
    settings: TrainSettings,
    hidden: Tensor,
    features: Tensor,
    size: int | None,
) -> Iterator[tuple[int, Tensor, _Rows]]:
    """Yield heads with chunks of what they predict and the positions [C] that they do it from."""
    size = size or chunk_size(target.vocab_size, hidden.device)
    tokens = batch.tokens.flatten()
    chunks = zip(torch.split(batch.learnt, size), torch.split(batch.depth, size), strict=True)
    for learnt, depth in chunks:
        wanted = None
        if settings.loss != "ce":
            wanted = _softmax(target.logits(hidden[learnt]) / settings.kl_temperature)
        for k in range(heads.num_heads):
            known = depth > k
            position = (learnt - 1 - k)[known]
            rows = _Rows(
                features=features[k, position],
                parents=tokens[learnt[known]],
                labels=tokens[learnt[known] + 1],
                wanted=wanted if wanted is None or known.all() else wanted[known],
            )
            yield k, position, rows


def _add_guesses(loss: SelectorLoss | None, head: int, logits: Tensor, rows: _Rows) -> None:
    if loss is not None:
        loss.add(head, logits, rows.parents, rows.labels, rows.wanted)


def _head_backward(
    heads: TrainedHeads,
    head: int,
    rows: _Rows,
    weight: float,
    selector_loss: SelectorLoss | None,
    *,
    maximizes_acceptance: bool,
) -> tuple[Tensor, Tensor]:
    """Go forward and back through one head's lm_head for one chunk of predicted tokens.

    Args:
        heads: whose lm_heads get their gradient, where they are trained.
        head: k.
        rows: what to predict, from which features.
        weight: factor on the gradient.
        selector_loss: takes the head's guesses, if there is a selector.
        maximizes_acceptance: whether the loss is LK, not the cross entropy.

    Returns:
        the summed loss (a scalar), and the gradient [C, H] of ``weight * loss`` by the features.
    """
    rows.features.requires_grad_(True)
    logits = heads.logits(rows.features, head)
    _add_guesses(selector_loss, head, logits.detach(), rows)
    if maximizes_acceptance:
        assert rows.wanted is not None
        loss = _into_gradient_of_acceptance(logits.detach(), rows.wanted, weight)
    else:
        loss = into_gradient(logits.detach(), rows.labels, rows.wanted, weight)
    torch.autograd.backward(logits, logits.detach())
    assert rows.features.grad is not None
    return loss, rows.features.grad


def draw_learnt(batch: Batch, count: int, seed: list[int]) -> Batch:
    """Return the batch with `count` of its learnt tokens, drawn without replacement, in order."""
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.permutation(len(batch.learnt))[:count])
    return replace(batch, learnt=batch.learnt[kept], depth=batch.depth[kept])


@torch.no_grad()
def into_gradient(logits: Tensor, labels: Tensor, wanted: Tensor | None, weight: float) -> Tensor:
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


@torch.no_grad()
def _into_gradient_of_acceptance(logits: Tensor, wanted: Tensor, weight: float) -> Tensor:
    """Replace logits by the gradient of ``weight * LK``; return LK, summed.

    LK is ``-log(sum of min(p, q))`` of the target's distribution p and the head's q: the sum is how
    often the target accepts a token that is drawn from q (arXiv 2602.23881, the loss that has no
    hyper-parameter). A guess counts in the gradient where q is below p.
    """
    softmax = _softmax(logits)
    acceptance = torch.minimum(softmax, wanted).sum(dim=-1, keepdim=True)
    acceptance.clamp_(min=_MIN_ACCEPTANCE)
    below = softmax * (softmax < wanted)
    softmax.mul_(below.sum(dim=-1, keepdim=True)).sub_(below).div_(acceptance)
    torch.mul(softmax, weight, out=logits)
    return -acceptance.log().sum()


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1, dtype=torch.float32)
