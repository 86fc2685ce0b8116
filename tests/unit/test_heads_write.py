"""Heads written in other formats: what each holds, what it refuses, and that writing is atomic."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import assert_same_heads, make_heads, sequential_tensors, vllm_tensors
from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsCheckpoint, load_heads
from vllm_medusa.heads.io import write as heads_write
from vllm_medusa.heads.io.write import save_heads, with_target_lm_head
from vllm_medusa.tree.schedule import TreeSchedule

BASE = "owner/model"


def heads_for(base_model: str | None = BASE, **options: Any) -> HeadsCheckpoint:
    return dataclasses.replace(make_heads(**options), base_model=base_model)


def convert(heads: HeadsCheckpoint, write_format: str, tmp_path: Path) -> HeadsCheckpoint:
    save_heads(heads, tmp_path / "out", write_format)  # type: ignore[arg-type]
    return load_heads(tmp_path / "out", target_vocab_size=heads.spec.vocab_size)


def config_of(tmp_path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    return config


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


HELD = [
    ("vllm", {"lm_head": "own", "num_layers": 3, "logit_scale": 0.5}),
    ("vllm", {"lm_head": "own", "has_bias": False}),
    ("vllm", {"lm_head": "common"}),
    ("fasterdecoding", {"lm_head": "own"}),
    ("tgi", {"lm_head": "own", "num_layers": 3}),
    ("tgi", {"lm_head": "target"}),
]


@pytest.mark.parametrize(("write_format", "options"), HELD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_comes_back_the_same(
    tmp_path: Path, write_format: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    heads = heads_for(**options, dtype=dtype)
    loaded = convert(heads, write_format, tmp_path)
    source = write_format
    if write_format == "tgi" and options["lm_head"] == "own":
        source = "fasterdecoding"
    assert_same_heads(loaded, heads, source_format=source)
    assert loaded.base_model == BASE
    assert loaded.notes == ()


@pytest.mark.parametrize(
    ("write_format", "file"),
    [("fasterdecoding", "medusa_lm_head.pt"), ("tgi", "medusa_lm_head.safetensors")],
)
def test_sequential_files(tmp_path: Path, write_format: str, file: str) -> None:
    heads = heads_for()
    convert(heads, write_format, tmp_path)
    path = tmp_path / "out" / file
    tensors = torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)
    assert_same_tensors(tensors, sequential_tensors(heads))
    assert config_of(tmp_path) == {
        "base_model_name_or_path": BASE,
        "medusa_num_heads": 3,
        "medusa_num_layers": 1,
        "hidden_size": 8,
        "vocab_size": 20,
    }


def test_tgi_calls_heads_with_the_targets_lm_head_version_2(tmp_path: Path) -> None:
    convert(heads_for(lm_head="target"), "tgi", tmp_path)
    assert config_of(tmp_path)["version"] == "2"


@pytest.mark.parametrize("lm_head", ["own", "common"])
def test_vllm_files(tmp_path: Path, lm_head: str) -> None:
    heads = heads_for(lm_head=lm_head)
    convert(heads, "vllm", tmp_path)
    assert_same_tensors(load_file(tmp_path / "out" / "model.safetensors"), vllm_tensors(heads))
    assert config_of(tmp_path) == {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "num_heads": 3,
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "vocab_size": 20,
        "truncated_vocab_size": None,
        "medusa_fc_bias": True,
        "original_lm_head": lm_head == "common",
        "logit_scale": 1.0,
        "base_model_name_or_path": BASE,
    }


@pytest.mark.parametrize("write_format", ["fasterdecoding", "tgi"])
def test_common_lm_head_becomes_every_heads_own(tmp_path: Path, write_format: str) -> None:
    heads = heads_for(lm_head="common")
    loaded = convert(heads, write_format, tmp_path)
    assert loaded.spec.lm_head == "own"
    for h in range(3):
        assert torch.equal(loaded.tensors["lm_head.weight"][h], heads.tensors["lm_head.weight"])


@pytest.mark.parametrize("write_format", ["fasterdecoding", "tgi"])
def test_missing_biases_become_zeros(tmp_path: Path, write_format: str) -> None:
    heads = heads_for(has_bias=False)
    loaded = convert(heads, write_format, tmp_path)
    assert torch.equal(loaded.tensors["blocks.bias"], torch.zeros(3, 1, 8))
    assert torch.equal(loaded.tensors["blocks.weight"], heads.tensors["blocks.weight"])


def test_fasterdecoding_holds_tied_layers(tmp_path: Path) -> None:
    heads = heads_for(num_layers=2)
    for kind in ("weight", "bias"):
        heads.tensors[f"blocks.{kind}"][:, 1] = heads.tensors[f"blocks.{kind}"][:, 0]
    loaded = convert(heads, "fasterdecoding", tmp_path)
    assert_same_heads(loaded, heads, source_format="fasterdecoding")


@pytest.mark.parametrize(
    ("write_format", "options", "lost"),
    [
        ("vllm", {"lm_head": "low_rank"}, "the low-rank factors of the lm_heads would be lost"),
        ("fasterdecoding", {"lm_head": "low_rank"}, "the low-rank factors"),
        ("tgi", {"lm_head": "low_rank"}, "the low-rank factors"),
        ("vllm", {"lm_head": "target"}, "use the target's; name the target with --model"),
        ("fasterdecoding", {"lm_head": "target"}, "name the target with --model"),
        ("vllm", {"draft_vocab_size": 6}, "vLLM 0.32 fails to load one"),
        ("fasterdecoding", {"draft_vocab_size": 6}, "the token map would be lost"),
        ("tgi", {"draft_vocab_size": 6}, "the token map would be lost"),
        ("fasterdecoding", {"logit_scale": 0.5}, "logit_scale 0.5 would be lost; use --to vllm"),
        ("tgi", {"logit_scale": 0.5}, "logit_scale 0.5"),
        ("tgi", {"lm_head": "target", "num_layers": 2}, "name the target with --model"),
        ("fasterdecoding", {"num_layers": 2}, "the 2 different layers of each head would be lost"),
        ("fasterdecoding", {"base_model": None}, "must name the target; give --model"),
        ("tgi", {"base_model": None}, "must name the target; give --model"),
        ("vllm", {"root_size": 8}, "the matrices with which these heads read the last token"),
        ("tgi", {"root_size": 8}, "only the format of vllm_medusa holds them; keep the heads"),
        ("fasterdecoding", {"selector_rank": 2}, "the selector, which re-ranks these heads'"),
        ("vllm", {"prefix_window": 7}, "the layer with which these heads read the text before"),
    ],
)
def test_refuses_what_would_be_lost(
    tmp_path: Path, write_format: str, options: dict[str, Any], lost: str
) -> None:
    with pytest.raises(UserError) as caught:
        convert(heads_for(**options), write_format, tmp_path)
    assert str(caught.value).startswith(f"heads cannot be written as {write_format}: ")
    assert lost in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "version"),
    [({}, 1), ({"root_size": 8}, 2), ({"selector_rank": 2}, 2), ({"prefix_window": 7}, 4)],
)
def test_native_is_of_the_first_version_that_holds_the_heads(
    tmp_path: Path, options: dict[str, Any], version: int
) -> None:
    heads = heads_for(**options)
    assert_same_heads(convert(heads, "native", tmp_path), heads)
    assert config_of(tmp_path)["format"] == f"vllm_medusa.heads/{version}"


def test_fasterdecoding_layers_that_differ_in_the_bias_only(tmp_path: Path) -> None:
    heads = heads_for(num_layers=2)
    heads.tensors["blocks.weight"][:, 1] = heads.tensors["blocks.weight"][:, 0]
    with pytest.raises(UserError, match="different layers"):
        save_heads(heads, tmp_path / "out", "fasterdecoding")


def test_target_lm_head(tmp_path: Path) -> None:
    weight = torch.randn(20, 8)
    heads = with_target_lm_head(heads_for(lm_head="target"), weight)
    loaded = convert(heads, "vllm", tmp_path)
    assert loaded.spec.lm_head == "common"
    assert torch.equal(loaded.tensors["lm_head.weight"], weight)


@pytest.mark.parametrize("shape", [(20, 9), (21, 8)])
def test_target_lm_head_of_another_model(shape: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="has shape"):
        with_target_lm_head(heads_for(lm_head="target"), torch.zeros(shape))


@pytest.mark.parametrize("write_format", ["native", "vllm", "fasterdecoding", "tgi"])
def test_tree_goes_along(tmp_path: Path, write_format: str) -> None:
    paths = [[0], [1], [0, 0]]
    schedule = TreeSchedule.from_entries([(4, paths), (None, [])])
    heads = dataclasses.replace(heads_for(), tree_paths=paths, tree_schedule=schedule)
    converted = convert(heads, write_format, tmp_path)
    assert converted.tree_paths == paths
    assert converted.tree_schedule == schedule


def test_does_not_write_into_a_full_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(UserError, match="is not empty; name another directory or give --force"):
        save_heads(heads_for(), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


def test_overwrites_heads_and_leaves_none_of_the_old(tmp_path: Path) -> None:
    save_heads(heads_for(seed=1), tmp_path / "out", "tgi")
    save_heads(heads_for(seed=2), tmp_path / "out", "fasterdecoding", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "medusa_lm_head.pt"]
    assert_same_heads(
        load_heads(tmp_path / "out"), heads_for(seed=2), source_format="fasterdecoding"
    )


def test_overwrites_what_it_read_from(tmp_path: Path) -> None:
    save_heads(heads_for(), tmp_path / "out", "vllm")
    save_heads(load_heads(tmp_path / "out"), tmp_path / "out", "tgi", overwrite=True)
    loaded = load_heads(tmp_path / "out")
    assert_same_heads(loaded, heads_for(), source_format="fasterdecoding")


def test_does_not_overwrite_a_directory_with_other_files(tmp_path: Path) -> None:
    save_heads(heads_for(), tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'thesis.tex', which is no file of converted heads"):
        save_heads(heads_for(), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_does_not_overwrite_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file; name a directory"):
        save_heads(heads_for(), tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        save_heads(heads_for(seed=1), tmp_path / "out")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heads_write, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left.*nothing was changed"):
        save_heads(heads_for(seed=2), tmp_path / "out", overwrite=overwrite)
    assert os.listdir(tmp_path) == (["out"] if overwrite else [])
    if overwrite:
        assert_same_heads(load_heads(tmp_path / "out"), heads_for(seed=1))


def test_makes_parent_directories(tmp_path: Path) -> None:
    save_heads(heads_for(), tmp_path / "a" / "b" / "c")
    assert_same_heads(load_heads(tmp_path / "a" / "b" / "c"), heads_for())


def test_unwritable_parent(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_heads(heads_for(), tmp_path / "file" / "out")
