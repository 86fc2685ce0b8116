"""The batched heads against one plain PyTorch module per head."""

import pytest
import torch
import torch.nn.functional as F

from tests.checkpoints import make_heads
from tests.oracles.heads import features as slow_features
from tests.oracles.heads import logits as slow_logits
from vllm_medusa.heads import HeadsCheckpoint, MedusaHeads, head_logits


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


def test_root_aware_heads_equal_the_oracle() -> None:
    heads = make_heads(num_layers=2, root_size=5)
    module = MedusaHeads.from_checkpoint(heads, torch.float32)
    hidden, roots = torch.randn(4, 8), torch.randn(4, 5)
    torch.testing.assert_close(module(hidden, roots), slow_features(heads, hidden, roots))
    assert not torch.allclose(module(hidden, roots), module(hidden, roots.flip(0)))


def test_new_root_aware_heads_are_medusa_heads_and_learn() -> None:
    module = MedusaHeads(2, 1, 8, bias=True, root_size=5, dtype=torch.float32)
    hidden, roots = torch.randn(4, 8), torch.randn(4, 5)
    assert torch.equal(module(hidden, roots), hidden.expand(2, 4, 8))
    module(hidden, roots).square().sum().backward()
    assert module.root is not None
    assert module.root.grad is not None
    assert module.root.grad.abs().sum(dim=-1).gt(0).all()


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


@pytest.mark.parametrize("root_size", [None, 5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_canonical_tensors_are_those_of_the_checkpoint(
    has_bias: bool, root_size: int | None
) -> None:
    heads = make_heads(lm_head="target", num_layers=2, has_bias=has_bias, root_size=root_size)
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
