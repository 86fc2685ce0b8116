"""The batched heads against one plain PyTorch module per head."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.checkpoints import make_heads
from vllm_medusa.heads import HeadsCheckpoint, MedusaHeads, head_logits


def slow_features(heads: HeadsCheckpoint, hidden: torch.Tensor) -> torch.Tensor:
    """The oracle: head by head, layer by layer, nn.Linear and nn.SiLU. [K, B, H]"""
    features = []
    for h in range(heads.spec.num_heads):
        x = hidden
        for layer in range(heads.spec.num_layers):
            linear = nn.Linear(*reversed(heads.tensors["blocks.weight"][h, layer].shape))
            linear.weight.data = heads.tensors["blocks.weight"][h, layer]
            linear.bias.data = torch.zeros(heads.spec.hidden_size, dtype=hidden.dtype)
            if heads.spec.has_bias:
                linear.bias.data = heads.tensors["blocks.bias"][h, layer]
            x = x + nn.SiLU()(linear(x))
        features.append(x)
    return torch.stack(features)


def slow_logits(heads: HeadsCheckpoint, features: torch.Tensor) -> torch.Tensor:
    """The oracle: [K, B, V], one row and head at a time."""
    tensors = heads.tensors
    rows = []
    for h, feature in enumerate(features):
        if heads.spec.lm_head == "own":
            matrix = tensors["lm_head.weight"][h]
        elif heads.spec.lm_head == "common":
            matrix = tensors["lm_head.weight"]
        else:
            matrix = tensors["lm_head.up"][h] @ tensors["lm_head.down"][h]
        rows.append(torch.stack([matrix @ x for x in feature]))
    return torch.stack(rows)


def fast_logits(heads: HeadsCheckpoint, features: torch.Tensor) -> torch.Tensor:
    if heads.spec.lm_head == "low_rank":
        down, up = heads.tensors["lm_head.down"], heads.tensors["lm_head.up"]
        return head_logits(features, down=down, up=up)
    return head_logits(features, weight=heads.tensors["lm_head.weight"])


@pytest.mark.parametrize("lm_head", ["own", "common", "low_rank"])
def test_equals_the_oracle(lm_head: str) -> None:
    heads = make_heads(lm_head=lm_head, num_layers=2)
    module = MedusaHeads.from_checkpoint(heads, torch.float32)
    hidden = torch.randn(5, 8)
    features = module(hidden)
    assert features.shape == (3, 5, 8)
    torch.testing.assert_close(features, slow_features(heads, hidden))
    logits = fast_logits(heads, features)
    assert logits.shape == (3, 5, 20)
    torch.testing.assert_close(logits, slow_logits(heads, features), rtol=1e-4, atol=1e-4)


def test_no_rows() -> None:
    module = MedusaHeads.from_checkpoint(make_heads(), torch.float32)
    assert module(torch.empty(0, 8)).shape == (3, 0, 8)


def test_new_heads_pass_the_hidden_state_through() -> None:
    module = MedusaHeads(3, 2, 8, bias=True, dtype=torch.float32)
    hidden = torch.randn(4, 8)
    assert torch.equal(module(hidden), hidden.expand(3, 4, 8))


def test_new_heads_learn() -> None:
    module = MedusaHeads(2, 2, 8, bias=True, dtype=torch.float32)
    module(torch.randn(4, 8)).square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum(dim=-1).gt(0).any(dim=-1).all()


@pytest.mark.parametrize("has_bias", [True, False])
def test_canonical_tensors_are_those_of_the_checkpoint(has_bias: bool) -> None:
    heads = make_heads(lm_head="target", num_layers=2, has_bias=has_bias)
    tensors = MedusaHeads.from_checkpoint(heads, torch.float32).canonical_tensors()
    assert tensors.keys() == heads.tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, heads.tensors[name])
        assert tensor.is_contiguous()


def test_from_checkpoint_converts() -> None:
    module = MedusaHeads.from_checkpoint(make_heads(), torch.bfloat16)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_forward_copies_no_weights() -> None:
    """The weights go into the product as they lie: a copy of them would dominate a step."""
    module = MedusaHeads(4, 1, 256, bias=False, dtype=torch.float32)
    hidden = torch.randn(1, 256)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        module(hidden)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert 0 < allocated < module.weight.nbytes // 8


@pytest.mark.parametrize("given", [[], ["weight", "down"], ["down"], ["up"]])
def test_head_logits_wants_one_kind_of_lm_head(given: list[str]) -> None:
    with pytest.raises(ValueError, match="either weight, or down and up"):
        head_logits(torch.zeros(1, 1, 8), **dict.fromkeys(given, torch.zeros(1, 8, 8)))


def test_silu_not_relu() -> None:
    """One number by hand: 1 + SiLU(2 * 1 - 3) = 1 - sigmoid(-1)."""
    module = MedusaHeads(1, 1, 1, bias=True, dtype=torch.float64)
    module.weight.data.fill_(2.0)
    assert module.bias is not None
    module.bias.data.fill_(-3.0)
    out = module(torch.ones(1, 1, dtype=torch.float64)).item()
    assert out == pytest.approx(1 - F.sigmoid(torch.tensor(-1.0, dtype=torch.float64)).item())
