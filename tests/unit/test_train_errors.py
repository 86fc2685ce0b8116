"""Mistakes: one line that names the setting or file and the remedy, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from tests.checkpoints import make_heads
from tests.training import counting_rows, make_settings, save_llama, write_rows
from vllm_medusa.cli import main as cli
from vllm_medusa.data.rows import Row
from vllm_medusa.errors import UserError
from vllm_medusa.heads.io.write import save_heads
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training import run
from vllm_medusa.training.dataset import Dataset, load_dataset


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


def rows_with(path: Path, *, change: dict[str, Any], count: int = 20) -> Path:
    rows = counting_rows(count)
    return write_rows(path, [dataclasses.replace(row, **change) for row in rows])


def load(path: Path, **options: Any) -> Dataset:
    return load_dataset(path, **{"vocab_size": 50, "max_tokens": 128, "held_out": 0.1, **options})


def command_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run `train`, which must fail in one line; return that."""
    capsys.readouterr()
    assert cli.main(["train", *map(str, arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "it/s" not in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0: must be above 0"),
        ({"steps": None}, "give either --steps or --epochs"),
        ({"epochs": 1.0, "steps": 3}, "give either --steps or --epochs"),
        ({"num_heads": 0}, "--num-heads 0: must be above 0"),
        ({"lr": float("nan")}, "--lr nan: must be above 0"),
        ({"kl_temperature": -1.0}, "--kl-temperature -1.0: must be above 0"),
        ({"held_out": 0.0}, "--held-out 0.0: heads are chosen by rows"),
        ({"held_out": 1.5}, "--held-out 1.5: must be between 0 and 1"),
        ({"loss_positions": 0.0}, "--loss-positions 0: leaves nothing"),
        ({"rank": 4}, "--lm-head shared with --rank 4"),
        ({"lm_head": "low-rank"}, "--lm-head low-rank with --rank None"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1: must be at least 0"),
        ({"selector_only": True}, "--selector-only: trains a selector for given heads; give"),
        ({"heads": "h"}, "--heads: is for --selector-only and --joint"),
        ({"backbone_lr": 1e-4}, "--backbone-lr: the target is trained with --joint only"),
        ({"lora_rank": 8}, "--lora-rank: the target is trained with --joint only"),
        ({"joint": "full", "lora_rank": 8}, "--lora-rank: --joint full has no adapters"),
        ({"joint": "lora", "heads_warmup": 1.0}, "--heads-warmup 1: leaves no step"),
        ({"joint": "lora", "lora_dropout": 1.0}, "--lora-dropout 1.0: must be less than 1"),
        (
            {"joint": "lora", "selector_only": True, "heads": "h", "num_heads": 4},
            "--joint: --selector-only trains no heads",
        ),
        (
            {"joint": "lora", "heads": "h", "num_heads": 3},
            "--num-heads: --heads decides what heads there are",
        ),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_settings(**changes)
    assert message in str(caught.value)


def test_missing_target_missing_data_empty_data(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "heads"
    rest = ["--out", out, "--steps", 2, "--dtype", "float32"]
    message = command_line(capsys, "--model", tmp_path / "none", "--data", tmp_path, *rest)
    assert "no such file or directory" in message
    message = command_line(capsys, "--model", model, "--data", tmp_path / "none", *rest)
    assert "no such directory; vllm-medusa distill makes it" in message
    (tmp_path / "empty").mkdir()
    message = command_line(capsys, "--model", model, "--data", tmp_path / "empty", *rest)
    assert "holds no shards" in message
    assert not list(tmp_path.glob("heads*"))


def test_target_that_transformers_cannot_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such type"}))
    message = command_line(
        capsys, "--model", tmp_path, "--data", tmp_path, "--out", tmp_path / "o", "--steps", 2
    )
    assert "transformers cannot load it" in message


def test_rank_above_the_hidden_size(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows_with(tmp_path / "data", change={})
    rest = ["--steps", 2, "--lm-head", "low-rank", "--rank", 33]
    message = command_line(
        capsys, "--model", model, "--data", data, "--out", tmp_path / "heads", *rest
    )
    assert "--rank 33" in message
    assert "32" in message


def test_joint_training_that_cannot_be(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = rows_with(tmp_path / "data", change={})
    rest = ["--model", model, "--data", data, "--out", tmp_path / "o", "--steps", 2, "--joint"]
    message = command_line(capsys, *rest, "full", "--compile")
    assert "--compile: is for a target that is not trained" in message
    with monkeypatch.context() as patch:
        patch.setattr(run, "find_spec", lambda name: None if name == "peft" else name)
        message = command_line(capsys, *rest, "lora")
    assert 'needs peft: pip install "vllm-medusa[train]"' in message
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "num_processes", 2)
        message = command_line(capsys, *rest, "lora")
    assert "--joint: 2 processes were started" in message
    with monkeypatch.context() as patch:
        patch.setattr(FrozenTarget, "logits", lambda self, hidden: 2 * self.project(hidden))
        message = command_line(capsys, *rest, "full", "--loss", "ce", "--dtype", "float32")
    assert "use --loss ce, without --joint" in message
    heads = make_heads(lm_head="common", hidden_size=32, vocab_size=50)
    save_heads(heads, tmp_path / "heads")
    message = command_line(capsys, *rest, "full", "--heads", tmp_path / "heads")
    assert "heads with one lm_head common to all heads cannot be trained on" in message


def test_tokenizer_that_does_not_fit(tmp_path: Path) -> None:
    data = rows_with(
        tmp_path,
        change={
            "token_ids": np.array([1, 2, 50, 3], dtype=np.int32),
            "loss_mask": np.array([False, True, True, True]),
        },
    )
    with pytest.raises(UserError, match=r"holds token 50, the target has 50 tokens; use rows"):
        load(data)


def test_rows_without_answers(tmp_path: Path) -> None:
    mask = np.zeros(4, dtype=np.bool_)
    tokens = np.arange(4, dtype=np.int32)
    silent = {"token_ids": tokens, "loss_mask": mask}
    with pytest.raises(UserError, match="0 of 20 rows hold an answer"):
        load(rows_with(tmp_path / "none", change=silent))
    # An answer of the first token alone can be predicted by no position.
    first = {"token_ids": tokens, "loss_mask": np.arange(4) == 0}
    with pytest.raises(UserError, match="0 of 20 rows hold an answer"):
        load(rows_with(tmp_path / "first", change=first))
    rows = [*counting_rows(20), Row("silent", tokens, mask)]
    data = load(write_rows(tmp_path / "some", rows))
    assert data.num_without_answer == 1
    assert len(data.train) + len(data.held_out) == 20


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few to hold some out"):
        load(write_rows(tmp_path, counting_rows(1)))


def test_rows_beyond_the_targets_positions_are_cut_and_counted(tmp_path: Path) -> None:
    data = load(write_rows(tmp_path, counting_rows(20)), max_tokens=15)
    assert data.num_cut == sum(len(row.token_ids) > 15 for row in counting_rows(20)) > 0
    assert max(len(item.token_ids) for item in data.train + data.held_out) == 15


def test_split_depends_on_ids_alone(tmp_path: Path) -> None:
    rows = counting_rows(40)
    one = load(write_rows(tmp_path / "one", rows, per_shard=7))
    other = load(write_rows(tmp_path / "other", rows[::-1], per_shard=40))
    assert len(one.held_out) == 4
    assert {item.token_ids.tobytes() for item in one.held_out} == {
        item.token_ids.tobytes() for item in other.held_out
    }
    assert one.fingerprint != other.fingerprint  # another order is another run


def test_answers_to_one_prompt_stay_on_one_side(tmp_path: Path) -> None:
    rows = [
        dataclasses.replace(row, id=f"prompt {i % 10}") for i, row in enumerate(counting_rows(40))
    ]
    data = load(write_rows(tmp_path, rows))
    assert (len(data.train), len(data.held_out)) == (36, 4)
    held = {item.token_ids.tobytes() for item in data.held_out}
    prompts = {row.id for row in rows if row.token_ids.tobytes() in held}
    assert len(prompts) == 1
