"""The chunked loss with its hand-written gradient, against autograd on all logits at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles.prefix import in_context
from tests.oracles.recurrent import features as slow_features
from tests.training import VOCAB_SIZE, make_settings, make_target, random_documents
from vllm_medusa.data.rows import Row
from vllm_medusa.heads.gated import GatedLayers
from vllm_medusa.heads.prefix import PrefixAttention
from vllm_medusa.target.frozen import FrozenTarget, chunk_size
from vllm_medusa.training.loss import (
    _into_gradient_of_acceptance,
    accumulate_gradients,
    draw_learnt,
    into_gradient,
)
from vllm_medusa.training.model import TrainableHeads
from vllm_medusa.training.packing import build_batch
from vllm_medusa.training.settings import TrainSettings

DOCUMENTS = [random_documents(3, seed=1), random_documents(2, seed=2)]


def make_heads(settings: TrainSettings, target: FrozenTarget) -> TrainableHeads:
    """Heads that have moved away from their start, so that every gradient is different."""
    heads = TrainableHeads(settings, target)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.2
    return heads


def slow_losses(
    heads: TrainableHeads, target: FrozenTarget, documents: list[Row], settings: TrainSettings
) -> Tensor:
    """[K] summed loss of each head, one document, position and head at a time."""
    sums = [torch.zeros(()) for _ in range(heads.num_heads)]
    for item in documents:
        tokens = torch.from_numpy(item.token_ids).long()
        hidden = target.hidden(tokens[None], torch.arange(len(tokens))[None])[0]
        own = target.logits(hidden)
        read = hidden
        if heads.prefix is not None and not settings.recurrent:
            embeddings = target.embedding[tokens.roll(-1)]
            tensors, known = of_prefix(heads.prefix), range(len(tokens))
            read = torch.stack(
                [in_context(tensors, hidden, embeddings, t, known) for t in range(len(tokens))]
            )
        for t in range(len(tokens)):
            for k in range(heads.num_heads):
                predicted = t + 2 + k
                if predicted >= len(tokens) or not item.loss_mask[predicted]:
                    continue
                if settings.recurrent:
                    feature = recurrent_feature(heads, target, tokens, hidden, t, k)
                else:
                    feature = heads.features(read[t][None], following(tokens, t, heads))[k]
                log_q = F.log_softmax(heads.logits(feature, k)[0], dim=-1)
                wanted = F.softmax(own[predicted - 1] / settings.kl_temperature, dim=-1)
                if settings.loss == "ce":
                    sums[k] = sums[k] - log_q[tokens[predicted]]
                elif settings.loss == "lk":
                    accepted = [torch.min(p, q) for p, q in zip(wanted, log_q.exp(), strict=True)]
                    sums[k] = sums[k] - torch.stack(accepted).sum().log()
                else:
                    sums[k] = sums[k] - (wanted * log_q).sum()
    return torch.stack(sums)


def slow_distances(heads: TrainableHeads, target: FrozenTarget, documents: list[Row]) -> Tensor:
    """[K] summed distance of each recurrent head's features to the target's hidden states."""
    sums = [torch.zeros(()) for _ in range(heads.num_heads)]
    for item in documents:
        tokens = torch.from_numpy(item.token_ids).long()
        hidden = target.hidden(tokens[None], torch.arange(len(tokens))[None])[0]
        for t in range(len(tokens)):
            for k in range(heads.num_heads):
                predicted = t + 2 + k
                if predicted < len(tokens) and item.loss_mask[predicted]:
                    feature = recurrent_feature(heads, target, tokens, hidden, t, k)[0]
                    sums[k] = sums[k] + F.smooth_l1_loss(feature, hidden[predicted - 1])
    return torch.stack(sums)


def of_prefix(layer: PrefixAttention) -> dict[str, Tensor]:
    """Its parameters by canonical name, with their gradients."""
    return {
        "prefix.query": layer.projection[0],
        "prefix.key_value": layer.projection[1:],
        "prefix.output": layer.output,
        "prefix.bias": layer.bias,
    }


def recurrent_feature(
    heads: TrainableHeads,
    target: FrozenTarget,
    tokens: Tensor,
    hidden: Tensor,
    position: int,
    head: int,
) -> Tensor:
    """[1, H] of one recurrent head at one position of a document."""
    assert heads.prefix is not None
    layers, after = heads.blocks, target.embedding[tokens[1:]]
    assert isinstance(layers, GatedLayers)
    tensors = of_prefix(heads.prefix) | {
        "gated.embedded": layers.embedded,
        "gated.gate_up": layers.gate_up,
        "gated.down": layers.down,
    }
    end = position + 1
    drafted = after[end : end + head]
    return slow_features(tensors, hidden[:end], after[:end], range(end), list(drafted))[None]


def following(tokens: Tensor, position: int, heads: TrainableHeads) -> Tensor:
    """[1, K] the tokens after a position; zeros behind the document."""
    found = torch.zeros(1, heads.num_heads, dtype=torch.int64)
    after = tokens[position + 1 :][: heads.num_heads]
    found[0, : len(after)] = after
    return found


CASES = {
    "kl": {},
    "ce": {"loss": "ce"},
    "sharpened kl": {"kl_temperature": 0.5},
    "lk": {"loss": "lk"},
    "sharpened lk": {"loss": "lk", "kl_temperature": 0.5},
    "own lk": {"lm_head": "own", "loss": "lk"},
    "own": {"lm_head": "own", "num_layers": 2},
    "own ce": {"lm_head": "own", "loss": "ce"},
    "low-rank": {"lm_head": "low-rank", "rank": 8, "decay": 0.5},
    "root-aware": {"root_aware": True},
    "prefix attention": {"prefix_attention": True, "prefix_window": 3},
    "hydra": {"hydra": True},
    "hydra with prefix attention": {"hydra": True, "prefix_attention": True},
    "recurrent": {"recurrent": True, "prefix_window": 3, "num_layers": 2, "inner_size": 5},
    "recurrent without distance": {"recurrent": True, "prefix_window": 9, "feature_weight": 0},
    "hydra of 3 layers": {"hydra": True, "num_layers": 3, "lm_head": "own", "loss": "lk"},
}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_autograd(case: str, chunk: int) -> None:
    settings = make_settings(**CASES[case])
    target = make_target()
    heads, slow_heads = make_heads(settings, target), make_heads(settings, target)
    batch = build_batch(DOCUMENTS, max(sum(len(d.token_ids) for d in row) for row in DOCUMENTS) + 3)
    scale = 1 / len(batch.learnt)
    losses = accumulate_gradients(heads, target, batch, settings, scale, chunk)

    slow = slow_losses(slow_heads, target, [d for row in DOCUMENTS for d in row], settings) * scale
    if settings.recurrent:
        distances = slow_distances(slow_heads, target, [d for row in DOCUMENTS for d in row])
        slow_sum = slow + settings.weight_of_features * scale * distances
    else:
        slow_sum = slow
    (slow_sum * settings.decay ** torch.arange(settings.num_heads)).sum().backward()
    torch.testing.assert_close(losses, slow.detach(), rtol=1e-4, atol=1e-5)
    for name, parameter in heads.named_parameters():
        expected = slow_heads.get_parameter(name).grad
        assert expected is not None
        assert expected.abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_gradients_add_up_over_batches() -> None:
    settings, target = make_settings(), make_target()
    heads, together = make_heads(settings, target), make_heads(settings, target)
    for row in DOCUMENTS:
        accumulate_gradients(heads, target, build_batch([row], 100), settings, 0.1)
    accumulate_gradients(together, target, build_batch(DOCUMENTS, 100), settings, 0.1)
    for name, parameter in together.named_parameters():
        torch.testing.assert_close(
            heads.get_parameter(name).grad, parameter.grad, atol=1e-5, rtol=1e-3
        )


def test_bfloat16_is_near_float32() -> None:
    settings = make_settings()
    target = make_target()
    heads, low_heads = make_heads(settings, target), None
    batch = build_batch(DOCUMENTS, 100)
    exact = accumulate_gradients(heads, target, batch, settings, 1 / len(batch.learnt))
    low_target = FrozenTarget(make_target().model.bfloat16())
    low_heads = make_heads(settings, low_target)
    low = accumulate_gradients(low_heads, low_target, batch, settings, 1 / len(batch.learnt))
    torch.testing.assert_close(low, exact, rtol=0.05, atol=0.05)
    assert low_heads.blocks.weight.grad is not None
    assert low_heads.blocks.weight.grad.dtype == torch.float32
    cosine = F.cosine_similarity(
        low_heads.blocks.weight.grad.flatten(), heads.blocks.weight.grad.flatten(), dim=0
    )
    assert cosine > 0.98


def test_unlikely_label_has_finite_loss() -> None:
    """The probability of the label underflows; its loss is the difference of the logits."""
    settings, target = make_settings(loss="ce", num_heads=1), make_target()
    with torch.no_grad():
        target.weight.mul_(200)
    heads = TrainableHeads(settings, target)
    batch = build_batch(DOCUMENTS, 100)
    losses = accumulate_gradients(heads, target, batch, settings, 1 / len(batch.learnt))
    slow = slow_losses(heads, target, [d for row in DOCUMENTS for d in row], settings)
    assert losses.isfinite().all()
    assert losses[0] > 100
    torch.testing.assert_close(losses, slow.detach() / len(batch.learnt), rtol=1e-4, atol=1e-3)


def test_acceptance_of_heads_that_are_the_target_is_certain() -> None:
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    gradient = logits.clone()
    loss = _into_gradient_of_acceptance(gradient, logits.softmax(dim=-1), 1.0)
    assert loss.abs() < 1e-5
    # One alone of the target's tokens is what cross entropy would learn.
    label = torch.tensor([2, 5, 0])
    by_label, by_acceptance = logits.clone(), logits.clone()
    loss = _into_gradient_of_acceptance(by_acceptance, F.one_hot(label, 7).float(), 0.5)
    torch.testing.assert_close(loss, into_gradient(by_label, label, None, 0.5))
    torch.testing.assert_close(by_acceptance, by_label)


def test_acceptance_that_underflows_has_a_finite_gradient() -> None:
    logits = torch.tensor([[0.0, 500.0, 0.0]])
    loss = _into_gradient_of_acceptance(logits, torch.tensor([[1.0, 0.0, 0.0]]), 1.0)
    assert loss > 50
    assert logits.isfinite().all()


def test_never_holds_the_whole_batchs_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, target = make_settings(), make_target()
    heads = make_heads(settings, target)
    rows: list[int] = []
    projected = TrainableHeads.logits

    def record(self: TrainableHeads, features: Tensor, head: int) -> Tensor:
        rows.append(len(features))
        return projected(self, features, head)

    monkeypatch.setattr(TrainableHeads, "logits", record)
    batch = build_batch(DOCUMENTS, 100)
    accumulate_gradients(heads, target, batch, settings, 1.0, 5)
    assert max(rows) == 5
    assert sum(rows) > 2 * len(batch.learnt)


def test_chunk_size_follows_the_vocabulary() -> None:
    cpu = torch.device("cpu")
    assert chunk_size(4096, cpu) * 4096 <= 2**20
    assert chunk_size(2**24, cpu) == 16
    assert chunk_size(VOCAB_SIZE, cpu) > 1000


def test_draw_learnt_draws_a_share_in_order_and_repeatably() -> None:
    batch = build_batch(DOCUMENTS, 100)
    drawn = draw_learnt(batch, 20, [0, 1, 2])
    assert drawn.learnt.tolist() == sorted(set(drawn.learnt.tolist()))
    assert len(drawn.learnt) == 20
    assert set(drawn.learnt.tolist()) < set(batch.learnt.tolist())
    depth = dict(zip(batch.learnt.tolist(), batch.depth.tolist(), strict=True))
    assert drawn.depth.tolist() == [depth[u] for u in drawn.learnt.tolist()]
    assert torch.equal(draw_learnt(batch, 20, [0, 1, 2]).learnt, drawn.learnt)
    assert not torch.equal(draw_learnt(batch, 20, [0, 1, 3]).learnt, drawn.learnt)


def test_step_with_nothing_known_to_a_head_has_no_loss_for_it() -> None:
    """Answers so near the start that the last head has no position to predict from."""
    settings, target = make_settings(num_heads=3), make_target()
    heads = make_heads(settings, target)
    short = replace(DOCUMENTS[0][0])
    short = Row("", short.token_ids[:4], short.loss_mask[:4] | True)
    losses = accumulate_gradients(heads, target, build_batch([[short]], 4), settings, 1.0)
    assert losses[0] > 0
    assert losses[1] > 0
    assert losses[2] == 0
