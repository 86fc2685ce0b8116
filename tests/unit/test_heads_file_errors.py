"""Each fault of files, paths, config.json and trees is one line that says what to do."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import (
    backbone_tensors,
    change_config,
    error,
    make_heads,
    sequential_tensors,
    write,
    write_fasterdecoding,
    write_merged,
    write_modelopt,
    write_vllm,
)
from vllm_medusa.heads import load_heads


@pytest.mark.parametrize("keep", [0, 3, 7, 40, 0.5, 0.99])
@pytest.mark.parametrize("file", ["heads.safetensors", "heads.pt", "legacy.bin"])
def test_truncated_file(tmp_path: Path, keep: float, file: str) -> None:
    tensors = sequential_tensors(make_heads())
    path = tmp_path / file
    if file == "legacy.bin":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        write(tmp_path, tensors, None, file)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    message = error(tmp_path)
    assert str(path) in message
    assert "truncated or damaged" in message


@pytest.mark.parametrize("file", ["heads.safetensors", "heads.pt", "heads.bin"])
def test_garbage_file(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(bytes(range(256)) * 10)
    assert "truncated or damaged" in error(tmp_path)


class Payload:
    """Would run a command if unpickled as code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_not_run(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "ran"
    content = sequential_tensors(make_heads()) | {"evil": Payload(mark)}
    torch.save(content, tmp_path / "heads.pt", _use_new_zipfile_serialization=zipped)
    assert "pickled code or objects, which are never executed" in error(tmp_path)
    assert not mark.exists()


def test_bare_pickle_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "heads.bin").write_bytes(pickle.dumps(Payload(mark)))
    assert "heads.bin" in error(tmp_path)
    assert not mark.exists()


def test_pickled_module(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "heads.pt")
    assert "pickled code or objects" in error(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": torch.ones(1)}}, {1: "a"}])
def test_torch_file_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "heads.pt")
    assert "something other than a flat dictionary of tensors" in error(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    write_modelopt(tmp_path, make_heads(), num_shards=3)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    message = error(tmp_path)
    assert "model-00003-of-00003.safetensors: the shard that holds tensor 'medusa_heads." in message


def test_index_promises_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    tensors = sequential_tensors(make_heads(), "medusa_heads.")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    del tensors["medusa_heads.1.1.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "tensor 'medusa_heads.1.1.weight' is missing although the index" in error(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}']
)
def test_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json" in error(tmp_path)


def test_model_without_heads(tmp_path: Path) -> None:
    message = error(write(tmp_path, backbone_tensors(), {"hidden_size": 8}, "model.safetensors"))
    assert "holds no Medusa heads" in message
    assert '"model": HEADS' in message


def test_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "no weights file (*.safetensors, *.pt, *.bin, *.pth)" in error(tmp_path)


def test_missing_path(tmp_path: Path) -> None:
    message = error(tmp_path / "nothing")
    assert "nothing': no such file or directory" in message
    assert "no such file or directory" in error(str(tmp_path / "nothing"))
    assert "no such file or directory" in error("nothing")
    assert "no such file or directory" in error("")[:60] or "weights file" in error("")


def test_unknown_suffix(tmp_path: Path) -> None:
    path = tmp_path / "heads.gguf"
    path.write_bytes(b"GGUF")
    assert "unknown kind of weights file" in error(path)


def test_other_hidden_size(tmp_path: Path) -> None:
    write_fasterdecoding(tmp_path, make_heads())
    message = error(tmp_path, target_hidden_size=16)
    assert "the heads are for hidden size 8, the target model has 16" in message


@pytest.mark.parametrize("lm_head", ["own", "common", "target"])
def test_other_vocabulary(tmp_path: Path, lm_head: str) -> None:
    write_vllm(tmp_path, make_heads(lm_head=lm_head))
    message = error(tmp_path, target_vocab_size=32000)
    assert "the heads are for vocabulary size 20, the target model has 32000" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 16}, "hidden_size is 16, but the heads' tensors have 8"),
        ({"vocab_size": 21}, "vocab_size is 21, but the heads' tensors have 20"),
        ({"num_heads": 5}, "says 5 heads, but the checkpoint holds 3"),
        ({"num_hidden_layers": 2}, "says 2 layers per head, but the checkpoint holds 1"),
        ({"num_heads": "3"}, "num_heads is '3'; set it to a positive integer"),
        ({"num_heads": True}, "num_heads is True"),
        ({"hidden_size": -8}, "hidden_size is -8"),
        ({"logit_scale": 0}, "logit_scale is 0; set it to a positive number"),
        ({"logit_scale": float("nan")}, "logit_scale is nan"),
        ({"logit_scale": "1"}, "logit_scale is '1'"),
        ({"original_lm_head": "no"}, "original_lm_head is 'no'; set it to true or false"),
        ({"format": "vllm_medusa.heads/6"}, "format is 'vllm_medusa.heads/6'"),
    ],
)
def test_config_that_contradicts_the_tensors(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    write_vllm(tmp_path, make_heads())
    change_config(tmp_path, **changes)
    message = error(tmp_path)
    assert expected in message
    assert str(tmp_path / "config.json") in message


def test_config_announces_biases_that_are_not_there(tmp_path: Path) -> None:
    write_vllm(tmp_path, make_heads(has_bias=False))
    change_config(tmp_path, medusa_fc_bias=True)
    assert "medusa_fc_bias is true, but the checkpoint holds no biases" in error(tmp_path)


def test_layers_of_a_merged_models_backbone_are_not_the_heads(tmp_path: Path) -> None:
    assert load_heads(write_merged(tmp_path, make_heads())).notes == ()


@pytest.mark.parametrize("content", ["", "{", "[1]", '"a"', "\x00"])
def test_damaged_config(tmp_path: Path, content: str) -> None:
    write_vllm(tmp_path, make_heads())
    (tmp_path / "config.json").write_text(content)
    assert str(tmp_path / "config.json") in error(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ('{"format": "other", "paths": [[0]]}', "'other'"),
        ('{"format": "vllm_medusa.tree/1"}', "no list of paths"),
        ("[]", "no paths"),
        ("[[0], [1, 1]]", "tree path [1, 1] has no parent"),
        ("[[0], [0]]", "tree path [0] is given twice"),
        ('[[0], ["a"]]', "rank 'a'"),
        ("[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]", "the heads are 3"),
    ],
)
def test_bad_tree(tmp_path: Path, content: str, expected: str) -> None:
    write_fasterdecoding(tmp_path, make_heads())
    (tmp_path / "medusa_tree.json").write_text(content)
    message = error(tmp_path)
    assert expected in message
    assert "medusa_tree.json" in message


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"max_batch_size": 1, "paths": [[0, 0]]}], "[0, 0] has no parent"),
        ([{"max_batch_size": 1, "paths": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]}], "heads are 3"),
    ],
)
def test_bad_tree_schedule(tmp_path: Path, entries: list[object], expected: str) -> None:
    write_fasterdecoding(tmp_path, make_heads())
    schedule = {"format": "vllm_medusa.tree_schedule/1", "entries": entries}
    (tmp_path / "medusa_tree_schedule.json").write_text(json.dumps(schedule))
    message = error(tmp_path)
    assert expected in message
    assert "medusa_tree_schedule.json" in message
    assert "calibrate" in message
