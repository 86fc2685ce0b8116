"""Training a selector: its loss and gradient against one guess at a time, and what it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.heads import NUM_CANDIDATES
from tests.training import make_settings, make_target, random_documents
from vllm_medusa.data.rows import Row
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.loss import accumulate_gradients
from vllm_medusa.training.model import HeadsAsTheyAre, TrainableHeads, TrainedHeads
from vllm_medusa.training.packing import build_batch
from vllm_medusa.training.settings import TrainSettings

DOCUMENTS = [random_documents(3, seed=1), random_documents(2, seed=2)]


def move(heads: TrainedHeads) -> TrainedHeads:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return heads


def frozen(settings: TrainSettings, target: FrozenTarget, **kind: object) -> HeadsAsTheyAre:
    """A selector for heads that were trained before."""
    made = move(TrainableHeads(make_settings(**kind), target))
    return HeadsAsTheyAre(made.checkpoint(torch.float32, "m"), settings, target)


def slow_losses(
    heads: TrainedHeads, target: FrozenTarget, documents: list[Row], settings: TrainSettings
) -> Tensor:
    """[K] summed loss of each head's selector, one document, position, head and guess at a time."""
    selector = heads.selector
    assert selector is not None
    sums = [torch.zeros(()) for _ in range(heads.num_heads)]
    for item in documents:
        tokens = torch.from_numpy(item.token_ids).long()
        hidden = target.hidden(tokens[None], torch.arange(len(tokens))[None])[0]
        own = target.logits(hidden)
        for t in range(len(tokens) - 1):
            for k in range(heads.num_heads):
                predicted = t + 2 + k
                if predicted >= len(tokens) or not item.loss_mask[predicted]:
                    continue
                feature = heads.features(
                    hidden[t][None], tokens[t + 1][None, None].expand(1, heads.num_heads)
                )[k].detach()
                logits = heads.logits(feature, k)[0].detach()
                above = selector.parent[tokens[predicted - 1]] * selector.depth[k]
                guesses = logits.topk(NUM_CANDIDATES).indices.tolist()
                scores = [
                    logits[g] * heads.logit_scale + above @ selector.child[g] for g in guesses
                ]
                log_q = F.log_softmax(torch.stack(scores), dim=-1)
                wanted = F.softmax(own[predicted - 1] / settings.kl_temperature, dim=-1)
                for guess, value in zip(guesses, log_q, strict=True):
                    if settings.loss == "ce":
                        sums[k] = sums[k] - value * (guess == tokens[predicted])
                    else:
                        sums[k] = sums[k] - value * wanted[guess]
    return torch.stack(sums)


KINDS = {
    "kl": {},
    "lk": {"loss": "lk"},
    "ce": {"loss": "ce"},
    "sharpened": {"kl_temperature": 0.5, "decay": 0.5},
}


@pytest.mark.parametrize("is_alone", [True, False])
@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient(kind: str, chunk: int, is_alone: bool) -> None:
    target = make_target()
    settings = make_settings(selector=True, root_aware=True, selector_rank=4, **KINDS[kind])
    heads: TrainedHeads = TrainableHeads(settings, target)
    if is_alone:
        alone = make_settings(
            selector_only=True, heads="h", num_heads=4, selector_rank=4, **KINDS[kind]
        )
        heads = frozen(alone, target, root_aware=True)
    move(heads)
    batch = build_batch(DOCUMENTS, max(sum(len(d.token_ids) for d in row) for row in DOCUMENTS) + 3)
    scale = 1 / len(batch.learnt)
    losses = accumulate_gradients(heads, target, batch, settings, scale, chunk)

    slow = slow_losses(heads, target, [d for row in DOCUMENTS for d in row], settings) * scale
    if is_alone:
        torch.testing.assert_close(losses, slow.detach(), rtol=1e-4, atol=1e-5)
    assert heads.selector is not None
    parameters = list(heads.selector.parameters())
    assert len(parameters) == 3
    expected = torch.autograd.grad(
        (slow * settings.decay ** torch.arange(heads.num_heads)).sum(), parameters
    )
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_selector_leaves_the_heads_own_loss_alone() -> None:
    target = make_target()
    batch = build_batch(DOCUMENTS, max(sum(len(d.token_ids) for d in row) for row in DOCUMENTS) + 3)
    gradients = []
    for selector in (True, False):
        settings = make_settings(selector=selector, selector_rank=4, num_layers=2)
        heads = TrainableHeads(settings, target)
        losses = accumulate_gradients(heads, target, batch, settings, 0.1)
        gradients.append((losses, heads.blocks.weight.grad, heads.blocks.bias.grad))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_heads_of_a_selector_alone_have_no_parameters() -> None:
    settings = make_settings(selector_only=True, heads="h", num_heads=4, selector_rank=4)
    heads = frozen(settings, make_target())
    names = {name for name, _ in heads.named_parameters()}
    assert names == {"selector.parent", "selector.child", "selector.depth"}
