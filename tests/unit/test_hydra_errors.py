"""Hydra heads that are refused, each in one line with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import assert_same_heads, error, write, write_native
from tests.sequential_checkpoints import hydra_tensors, make_hydra, write_hydra
from tests.training import make_settings, make_target
from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsCheckpoint, load_heads
from vllm_medusa.heads.io.write import save_heads
from vllm_medusa.training.model import make_heads as make_trained_heads


def published() -> HeadsCheckpoint:
    return make_hydra(num_layers=2, has_lm_head_bias=True)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"hydra_mlp.1.0.res_connection.bias": None},
            "res_connection.bias' is missing for 3 Hydra",
        ),
        ({"hydra_lm_head.2.weight": None}, "hydra_lm_head.2.weight"),
        ({"other.weight": torch.ones(2)}, "'other.weight' is no part of 3 Hydra heads"),
        ({"hydra_mlp.1.0.linear.weight": torch.ones(8, 32)}, "expected [8, 32]"),
        ({"hydra_mlp.9.0.linear.weight": torch.ones(8, 8)}, "hydra_mlp"),
        ({"hydra_mlp.99.0.linear.weight": torch.ones(8, 8)}, "numbered up to head 99"),
        ({"prefix_embeding_layer.norm.weight": torch.ones(8)}, "prefix-mlp"),
        ({"hydra_lm_head.0.bias": torch.full((20,), torch.nan)}, "NaN"),
    ],
)
def test_incomplete_or_other(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    tensors = hydra_tensors(published()) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    assert wanted in error(write(tmp_path, kept, {}, "hydra_lm_head.pt"))


def test_heads_that_read_no_tokens(tmp_path: Path) -> None:
    tensors = {
        name: tensor
        for name, tensor in hydra_tensors(published()).items()
        if "res_connection" not in name
    }
    assert "grounded_heads is false" in error(write(tmp_path, tensors, {}, "hydra_lm_head.pt"))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"hidden_state_offset": 1}, "hidden_state_offset is 1"),
        ({"hydra_num_heads": 5}, "says 5 heads"),
    ],
)
def test_config(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    assert wanted in error(write_hydra(tmp_path, published(), **changes))


def test_sizes_that_do_not_fit_each_other(tmp_path: Path) -> None:
    heads = make_hydra(num_layers=2)
    heads.tensors["hydra.1.weight"] = torch.ones(2, 8, 23)
    assert "Hydra head 1" in error(write_native(tmp_path / "sizes", heads))
    heads = make_hydra(num_layers=2, lm_head="target")
    for kind in ("weight", "bias"):
        heads.tensors[f"blocks.{kind}"] = heads.tensors[f"blocks.{kind}"][:2]
    assert "'blocks.weight' is for 2" in error(write_native(tmp_path / "count", heads))


def test_biases_beside_a_token_map(tmp_path: Path) -> None:
    heads = make_hydra(draft_vocab_size=9, has_lm_head_bias=True)
    assert "lm_heads with biases" in error(write_native(tmp_path, heads))


@pytest.mark.parametrize("lm_head", ["target", "low_rank", "common"])
def test_biases_without_lm_heads_of_their_own(tmp_path: Path, lm_head: str) -> None:
    heads = make_hydra(lm_head=lm_head, has_lm_head_bias=True)
    assert "is no part of stacked heads" in error(write_native(tmp_path, heads))


def test_target_of_other_sizes(tmp_path: Path) -> None:
    path = write_hydra(tmp_path, published())
    assert "hidden size 8" in error(path, target_hidden_size=16)
    assert "vocabulary size 20" in error(path, target_vocab_size=21)


def test_writing(tmp_path: Path) -> None:
    heads = published()
    save_heads(heads, tmp_path / "native")
    assert_same_heads(load_heads(tmp_path / "native"), heads)
    for name in ("vllm", "fasterdecoding", "tgi"):
        with pytest.raises(UserError, match="the layers with which hydra heads read"):
            save_heads(heads, tmp_path / name, name)


@pytest.mark.parametrize("values", [{"selector_only": True}, {"joint": "lora"}])
def test_training_on(tmp_path: Path, values: dict[str, Any]) -> None:
    heads = make_hydra(hidden_size=32, vocab_size=50, root_size=32)
    save_heads(heads, tmp_path / "heads")
    settings = make_settings(heads=str(tmp_path / "heads"), num_heads=4, **values)
    with pytest.raises(UserError, match="are hydra heads, which are not trained on"):
        make_trained_heads(settings, make_target())


@pytest.mark.parametrize(
    "values", [{"root_aware": True}, {"selector": True}, {"joint": "lora"}], ids=str
)
def test_settings(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"Hydra heads.*leave it out"):
        make_settings(hydra=True, **values)
