"""Recurrent heads in files: written, read, and refused in one line with a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import assert_same_heads, error, make_recurrent
from tests.training import make_settings, make_target
from vllm_medusa.cli.main import main
from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsCheckpoint, HeadsReader, load_heads
from vllm_medusa.heads.io.formats import PREFIX_ATTENTION
from vllm_medusa.heads.io.write import save_heads
from vllm_medusa.training.model import make_heads as make_trained_heads


def recurrent(num_heads: int = 5) -> HeadsCheckpoint:
    """Random ones of two layers."""
    return make_recurrent(num_heads=num_heads, num_layers=2)


def written(path: Path, **changes: Any) -> Path:
    """Write heads, with other values in config.json."""
    save_heads(recurrent(), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


def test_written_and_read(tmp_path: Path) -> None:
    heads = recurrent()
    save_heads(heads, tmp_path / "heads")
    loaded = load_heads(tmp_path / "heads", target_vocab_size=20)
    assert_same_heads(loaded, heads)
    assert loaded.spec.kind == "recurrent"
    assert loaded.spec.num_heads == 5
    # Older versions would take them for one Medusa head.
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    assert config["format"] == "vllm_medusa.heads/5"
    # The layers are those of all heads, so a shallow tree needs them too.
    tensors = HeadsReader(tmp_path / "heads", target_vocab_size=20).read_blocks(2)
    assert set(tensors) == {"gated.embedded", "gated.gate_up", "gated.down"}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num_heads": None}, "says not how many tokens the recurrent heads draft; set num_heads"),
        ({"num_heads": "two"}, "set it to a positive integer"),
        ({"num_layers": 3}, "says 3 layers per head, but the checkpoint holds 2"),
    ],
)
def test_config_of_others(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    assert wanted in error(written(tmp_path / "heads", **changes))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"gated.down": None}, "tensor 'gated.down' is missing"),
        ({"gated.down": (2, 8, 7)}, "has shape [2, 8, 7], expected [2, 8, 6]"),
        ({"gated.gate_up": (2, 3, 6, 8)}, "has shape [2, 3, 6, 8], expected [2, 2,"),
        ({"gated.embedded": (8, 4)}, "hidden size 8 + the target's embedding size"),
        ({"lm_head.weight": (20, 8)}, "no blocks or lm_heads; export"),
        ({"blocks.weight": (1, 2, 8, 8), "blocks.bias": (1, 2, 8)}, "no blocks or lm_heads"),
        (dict.fromkeys(PREFIX_ATTENTION), "which have a prefix attention"),
    ],
    ids=str,
)
def test_tensors_of_others(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    path = written(tmp_path / "heads")
    weights = path / "medusa_heads.safetensors"
    tensors = load_file(weights)
    shapes = {name: shape for name, shape in changes.items() if shape is not None}
    kept = {name: tensor for name, tensor in tensors.items() if name not in changes}
    save_file(kept | {name: torch.ones(*shape) for name, shape in shapes.items()}, weights)
    assert wanted in error(path)


def test_inspected_and_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "heads")
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "heads:            5, one that runs again for each drafted token (recurrent)" in shown
    assert "prefix attention: over 7 positions" in shown
    assert main(["convert", str(path), str(tmp_path / "out"), "--to", "vllm"]) != 0
    assert "recurrent heads read the tokens of a path would be lost" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("others", "flag"),
    [
        ({"root_aware": True}, "--root-aware"),
        ({"selector": True}, "--selector"),
        ({"prefix_attention": True}, "--prefix-attention"),
        ({"hydra": True}, "--hydra"),
        ({"lm_head": "own"}, "--lm-head"),
        ({"joint": "full"}, "--joint"),
    ],
)
def test_settings_of_other_kinds(others: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError, match=f"^{flag}: .*recurrent heads.*leave it out"):
        make_settings(recurrent=True, **others)


def test_settings_of_recurrent_heads_only() -> None:
    with pytest.raises(UserError, match=r"^--feature-weight: only --recurrent has features"):
        make_settings(feature_weight=1.0)
    with pytest.raises(UserError, match=r"^--inner-size: only --recurrent has layers with"):
        make_settings(inner_size=8)


def test_not_trained_on(tmp_path: Path) -> None:
    target = make_target()
    heads = make_recurrent(hidden_size=target.hidden_size, vocab_size=target.vocab_size)
    save_heads(heads, tmp_path / "heads")
    settings = make_settings(heads=str(tmp_path / "heads"), selector_only=True, num_heads=4)
    with pytest.raises(UserError, match="are recurrent heads, which are not trained on"):
        make_trained_heads(settings, target)
