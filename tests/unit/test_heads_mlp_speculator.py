"""MLP speculators: reading them, and their layers against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import assert_same_heads, error, write
from tests.oracles import heads as oracle
from tests.sequential_checkpoints import make_mlp_speculator, write_mlp_speculator
from vllm_medusa.errors import UserError
from vllm_medusa.heads import load_heads
from vllm_medusa.heads.io.write import save_heads
from vllm_medusa.heads.mlp_speculator import MlpSpeculator
from vllm_medusa.heads.sequential import features_along

KINDS: list[dict[str, Any]] = [
    {},
    {"is_tied": True},
    {"is_tied": True, "num_heads": 4, "scales_input": True},
    {"inner_size": 8, "scales_input": True, "num_heads": 1},
]


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_reading(tmp_path: Path, kind: dict[str, Any], repeats: bool) -> None:
    heads = make_mlp_speculator(**kind, dtype=torch.float16)
    loaded = load_heads(write_mlp_speculator(tmp_path, heads, repeats=repeats))
    assert_same_heads(loaded, heads)
    assert loaded.notes == ()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_features_are_the_oracles_on_every_path(kind: dict[str, Any]) -> None:
    checkpoint = make_mlp_speculator(**kind)
    spec = checkpoint.spec
    for num_heads in range(1, spec.num_heads + 1):
        heads = MlpSpeculator(
            checkpoint.tensors,
            num_heads,
            spec.num_heads,
            scales_input=spec.scales_input,
            dtype=torch.float32,
        )
        hidden, following = torch.randn(5, 8) * 3, torch.randint(20, (5, num_heads))
        found = features_along(heads, num_heads, hidden, following)
        for head in range(num_heads):
            for row in range(5):
                tokens = following[row, : head + 1].tolist()
                slow = oracle.mlp_features(checkpoint, hidden[row], tokens)
                torch.testing.assert_close(found[head, row], slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "wanted"),
    [
        ({}, {"n_predict": 4}, "says 4 heads"),
        ({}, {"emb_dim": 9}, "hidden_size is 9"),
        ({"is_tied": True}, {"n_predict": None}, "n_predict is None"),
        ({"is_tied": True}, {"n_predict": 1}, "n_predict is 1"),
        ({"is_tied": True}, {"tie_weights": False}, "is missing for an MLP speculator of 2 heads"),
    ],
)
def test_config(tmp_path: Path, kind: dict[str, Any], changes: dict[str, Any], wanted: str) -> None:
    heads = make_mlp_speculator(**kind)
    assert wanted in error(write_mlp_speculator(tmp_path, heads, **changes))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    tensors = {
        f"speculator.{name}": torch.ones(shape)
        for name, shape in (
            ("emb.0.weight", (20, 6)),
            ("proj.0.weight", (6, 8)),
            ("ln.0.weight", (6,)),
            ("ln.0.bias", (5,)),
            ("head.0.weight", (20, 6)),
        )
    }
    assert "'speculator.ln.0.bias' has shape [5]" in error(
        write(tmp_path / "shape", tensors, {}, "model.safetensors")
    )
    tensors["speculator.proj.50.weight"] = torch.ones(6, 6)
    message = error(write(tmp_path / "number", tensors, {}, "model.safetensors"))
    assert "numbered up to head 50" in message
    del tensors["speculator.proj.50.weight"]
    tensors["speculator.other.weight"] = torch.ones(2)
    assert "other.weight' is no part" in error(
        write(tmp_path / "other", tensors, {}, "model.safetensors")
    )


def test_writing_is_refused(tmp_path: Path) -> None:
    for name in ("native", "vllm", "tgi"):
        with pytest.raises(UserError, match="mlp_speculator heads read the tokens of a path"):
            save_heads(make_mlp_speculator(), tmp_path / name, name)
