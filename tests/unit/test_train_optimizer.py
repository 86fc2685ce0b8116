"""The schedule, clipping, and which optimizer sees which parameter."""

from __future__ import annotations

import math
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.training import make_settings, make_target
from vllm_medusa.training.loop import curve
from vllm_medusa.training.model import TrainableHeads
from vllm_medusa.training.optimizer import HeadsOptimizer, rate_factor
from vllm_medusa.training.settings import TrainSettings


def make(settings: TrainSettings) -> tuple[TrainableHeads, HeadsOptimizer]:
    heads = TrainableHeads(settings, make_target())
    return heads, HeadsOptimizer(heads, settings)


def set_gradients(heads: TrainableHeads, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3


def test_rate_rises_then_falls_to_zero() -> None:
    factors = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3
    assert rate_factor(0, 1, 0.0) == 1
    assert not math.isnan(rate_factor(5, 6, 1.0))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("lm_head", ["shared", "own"])
def test_every_parameter_moves_and_the_target_stays(optimizer: str, lm_head: str) -> None:
    settings = make_settings(optimizer=optimizer, lm_head=lm_head, num_layers=2)
    heads, optimizers = make(settings)
    before = {name: parameter.detach().clone() for name, parameter in heads.named_parameters()}
    assert before.keys() == {"blocks.weight", "blocks.bias"} | (
        {f"weight.{k}" for k in range(3)} if lm_head == "own" else set()
    )
    set_gradients(heads)
    optimizers.step(1.0)
    for name, parameter in heads.named_parameters():
        moved = (parameter.detach() - before[name]).flatten(2 if name == "blocks.weight" else 1)
        assert (moved.abs().amax(dim=-1) > 0).all(), name
        assert parameter.grad is None


def test_muon_is_torchs_on_each_matrix_alone() -> None:
    settings = make_settings(optimizer="muon", num_layers=2, weight_decay=0.1, clip=1e9)
    heads, optimizers = make(settings)
    single = nn.Parameter(heads.blocks.weight.detach()[1, 2].clone())
    muon = torch.optim.Muon([single], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        set_gradients(heads, step)
        assert heads.blocks.weight.grad is not None
        single.grad = heads.blocks.weight.grad[1, 2].clone()
        muon.param_groups[0]["lr"] = 1e-2 * 0.5
        optimizers.step(0.5)
        muon.step()
    torch.testing.assert_close(heads.blocks.weight.detach()[1, 2], single.detach())


def test_adamw_decays_matrices_and_spares_biases() -> None:
    settings = make_settings(lm_head="own", weight_decay=0.5, lr=0.1)
    heads, optimizers = make(settings)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizers.step(1.0)
    assert heads.blocks.bias is not None
    assert (heads.blocks.bias == 1).all()
    torch.testing.assert_close(heads.weight[1].detach(), torch.full_like(heads.weight[1], 0.95))
    torch.testing.assert_close(
        heads.blocks.weight.detach(), torch.full_like(heads.blocks.weight, 0.95)
    )


def test_gradients_are_clipped() -> None:
    settings = make_settings(clip=1.0, optimizer="adamw")
    heads, optimizers = make(settings)
    set_gradients(heads)
    norm = math.sqrt(sum(float(g.square().sum()) for g in optimizers.gradients))
    seen = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW) -> None:
        seen.append(math.sqrt(sum(float(g.square().sum()) for g in optimizers.gradients)))
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        for parameter in heads.parameters():
            assert parameter.grad is not None
            parameter.grad *= 100 / norm
        optimizers.step(1.0)
    assert seen == [pytest.approx(1.0, rel=1e-3)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_goes_over_to_another_optimizer(optimizer: str) -> None:
    settings = make_settings(optimizer=optimizer)
    heads, first = make(settings)
    set_gradients(heads)
    first.step(1.0)
    copy, second = make(settings)
    copy.load_state_dict(heads.state_dict())
    second.load_state(deepcopy(first.state()))
    for each, optimizers in ((heads, first), (copy, second)):
        set_gradients(each, seed=1)
        optimizers.step(1.0)
    assert torch.equal(heads.blocks.weight, copy.blocks.weight)
    assert torch.equal(heads.blocks.bias, copy.blocks.bias)


def test_curve_averages_the_steps_between_its_points() -> None:
    assert list(curve([[float(i), 2.0 * i] for i in range(10)], 4)) == [
        (3, [1.0, 2.0]),
        (6, [4.0, 8.0]),
        (9, [7.0, 14.0]),
        (10, [9.0, 18.0]),
    ]
