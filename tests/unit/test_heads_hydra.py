"""Hydra heads: the layers against the oracle, one head and path at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints import assert_same_heads
from tests.oracles import heads as oracle
from tests.sequential_checkpoints import make_hydra
from tests.training import make_settings, make_target
from vllm_medusa.heads import load_heads
from vllm_medusa.heads.hydra import HydraHeads
from vllm_medusa.heads.io.write import save_heads
from vllm_medusa.heads.sequential import features_along
from vllm_medusa.training.model import TrainableHeads

EMBEDDING = torch.randn(20, 6, generator=torch.Generator().manual_seed(5))


def embed(tokens: Tensor) -> Tensor:
    return EMBEDDING[tokens]


def test_features_are_the_oracles_on_every_path() -> None:
    for num_layers in (1, 3):
        checkpoint = make_hydra(num_layers=num_layers, root_size=6)
        heads = HydraHeads.from_tensors(checkpoint.tensors, embed, torch.float32)
        hidden = torch.randn(5, 8)
        following = torch.randint(20, (5, 3))
        found = features_along(heads, 3, hidden, following)
        assert found.shape == (3, 5, 8)
        for head in range(3):
            for row in range(5):
                slow = oracle.hydra_features(checkpoint, head, hidden[row], embed(following[row]))
                torch.testing.assert_close(found[head, row], slow, rtol=1e-4, atol=1e-4)


def test_tensors_go_in_and_out() -> None:
    for num_layers in (1, 2):
        checkpoint = make_hydra(num_layers=num_layers, lm_head="target")
        heads = HydraHeads.from_tensors(checkpoint.tensors, embed, torch.float32)
        found = heads.canonical_tensors()
        assert found.keys() == checkpoint.tensors.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, checkpoint.tensors[name]), name
        parameters = {id(parameter) for parameter in heads.parameters()}
        assert {id(p) for p in (*heads.matrices, *heads.biases)} == parameters


def test_new_heads_pass_the_hidden_state_through() -> None:
    heads = HydraHeads(3, 2, 8, 6, embed, dtype=torch.float32)
    hidden = torch.randn(4, 8)
    for features in features_along(heads, 3, hidden, torch.randint(20, (4, 3))):
        assert torch.equal(features, hidden)


@pytest.mark.parametrize("lm_head", ["shared", "own", "low-rank"])
def test_trained_heads_are_written_and_load(tmp_path: Path, lm_head: str) -> None:
    rank = 4 if lm_head == "low-rank" else None
    settings = make_settings(hydra=True, num_layers=2, lm_head=lm_head, rank=rank)
    checkpoint = TrainableHeads(settings, make_target()).checkpoint(torch.bfloat16, "model")
    save_heads(checkpoint, tmp_path / "heads")
    assert_same_heads(load_heads(tmp_path / "heads"), checkpoint)
    assert checkpoint.spec.kind == "hydra"
    assert (checkpoint.spec.num_layers, checkpoint.spec.root_size) == (2, 32)
