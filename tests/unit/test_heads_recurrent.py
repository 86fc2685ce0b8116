"""Recurrent heads in files: written, read, and refused in one line with a remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import assert_same_heads, error, make_heads
from tests.training import make_settings, make_target
from vllm_medusa.cli.main import main
from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsCheckpoint, HeadsReader, load_heads
from vllm_medusa.heads.io.write import save_heads
from vllm_medusa.training.model import make_heads as make_trained_heads


def recurrent(num_heads: int = 5) -> HeadsCheckpoint:
    """Random ones of two layers."""
    made = make_heads(num_heads=1, num_layers=2, lm_head="target", root_size=5, prefix_window=7)
    spec = dataclasses.replace(made.spec, kind="recurrent", num_heads=num_heads)
    return dataclasses.replace(made, spec=spec)


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
    assert set(tensors) == {"blocks.weight", "blocks.bias", "root.weight"}
    assert len(tensors["blocks.weight"]) == 1


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"recurrent": "yes"}, "set it to true or false"),
        ({"num_heads": None}, "says recurrent heads"),
        ({"recurrent": False, "num_heads": 5}, "says 5 heads, but the checkpoint holds 1"),
    ],
)
def test_config_of_others(tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
    assert wanted in error(written(tmp_path / "heads", **changes))


@pytest.mark.parametrize(
    "kind",
    [{"num_heads": 2}, {"lm_head": "common"}, {"root_size": None}, {"prefix_window": None}],
    ids=str,
)
def test_tensors_of_others(tmp_path: Path, kind: dict[str, Any]) -> None:
    defaults = {"num_heads": 1, "lm_head": "target", "root_size": 5, "prefix_window": 7}
    save_heads(make_heads(**{**defaults, **kind}), tmp_path / "heads")
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    (tmp_path / "heads" / "config.json").write_text(json.dumps(config | {"recurrent": True}))
    assert "says recurrent heads" in error(tmp_path / "heads")


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


def test_weight_without_features() -> None:
    with pytest.raises(UserError, match=r"^--feature-weight: only --recurrent has features"):
        make_settings(feature_weight=1.0)


def test_not_trained_on(tmp_path: Path) -> None:
    target = make_target()
    made = make_heads(
        num_heads=1,
        lm_head="target",
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        root_size=5,
        prefix_window=7,
    )
    spec = dataclasses.replace(made.spec, kind="recurrent", num_heads=3)
    save_heads(dataclasses.replace(made, spec=spec), tmp_path / "heads")
    settings = make_settings(heads=str(tmp_path / "heads"), selector_only=True, num_heads=4)
    with pytest.raises(UserError, match="are recurrent heads, which are not trained on"):
        make_trained_heads(settings, target)
