"""Each fault of a checkpoint is one line that names what is wrong and what to do."""

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import (
    backbone_tensors,
    make_heads,
    sequential_tensors,
    vllm_tensors,
    write,
    write_fasterdecoding,
    write_merged,
    write_modelopt,
    write_native,
    write_vllm,
)
from vllm_medusa.heads import HeadsError, load_heads

REMEDY = re.compile(
    r"\b(export|use|give|name|remove|repair|set|save|copy|correct|keep|update|train|check|add|write)\b"
)


def error(path: Path | str, **options: Any) -> str:
    """The message of the refusal, checked for its form."""
    with pytest.raises(HeadsError) as caught:
        load_heads(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert REMEDY.search(message), message
    return message


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | changes))


Tensors = dict[str, torch.Tensor]
Fault = Callable[[Tensors], object]


def sequential_fault(tmp_path: Path, fault: Fault, **options: Any) -> str:
    tensors = sequential_tensors(make_heads(**options))
    fault(tensors)
    return error(write(tmp_path, tensors, None, "heads.safetensors"))


def vllm_fault(tmp_path: Path, fault: Fault, **options: Any) -> str:
    heads = make_heads(**options)
    write_vllm(tmp_path, heads)
    tensors = vllm_tensors(heads)
    fault(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return error(tmp_path)


def native_fault(tmp_path: Path, fault: Fault, **options: Any) -> str:
    heads = make_heads(**options)
    fault(heads.tensors)
    return error(write_native(tmp_path, heads))


@pytest.mark.parametrize(
    "name",
    ["1.0.linear.weight", "2.1.linear.weight", "0.1.linear.bias", "1.2.weight", "2.2.weight"],
)
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    message = sequential_fault(tmp_path, lambda tensors: tensors.pop(name), num_layers=2)
    assert f"tensor '{name}' is missing for 3 heads of 2 layers" in message


def test_missing_head_in_the_middle(tmp_path: Path) -> None:
    def fault(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("1.")]:
            del tensors[name]

    message = sequential_fault(tmp_path, fault)
    assert "'1.0.linear.weight', '1.0.linear.bias', '1.1.weight' is missing" in message


def test_missing_layer_shows_by_the_number_of_the_lm_head(tmp_path: Path) -> None:
    def fault(tensors: Tensors) -> None:
        for h in range(3):
            del tensors[f"{h}.1.linear.weight"], tensors[f"{h}.1.linear.bias"]

    message = sequential_fault(tmp_path, fault, num_layers=2)
    assert "'0.1.linear.weight'" in message
    assert "(and 3 more) is missing for 3 heads of 2 layers" in message


@pytest.mark.parametrize("name", ["blocks.1.layers.0.weight", "blocks.0.layers.0.bias"])
def test_missing_tensor_vllm(tmp_path: Path, name: str) -> None:
    message = vllm_fault(tmp_path, lambda tensors: tensors.pop(name))
    assert f"tensor '{name}' is missing" in message


def test_missing_lm_heads_vllm(tmp_path: Path) -> None:
    heads = make_heads(lm_head="target")
    write_vllm(tmp_path, heads)
    change_config(tmp_path, original_lm_head=False)
    assert "tensor 'lm_heads.0.weight', 'lm_heads.1.weight'" in error(tmp_path)


@pytest.mark.parametrize("name", ["lm_heads.down", "lm_heads.up"])
def test_missing_tensor_native(tmp_path: Path, name: str) -> None:
    canonical = name.replace("lm_heads", "lm_head")
    message = native_fault(tmp_path, lambda tensors: tensors.pop(canonical), lm_head="low_rank")
    assert f"tensor '{name}' is missing for stacked heads" in message


@pytest.mark.parametrize(
    "name",
    ["0.1.bias", "extra.weight", "3.weight", "0.0.linear.gain", "token_map", "lm_head.weight"],
)
def test_left_over_tensor(tmp_path: Path, name: str) -> None:
    message = sequential_fault(tmp_path, lambda t: t.update({name: torch.ones(8)}))
    assert f"tensor '{name}' is no part of 3 heads of 1 layers" in message


def test_left_over_lm_head_with_own_lm_heads_vllm(tmp_path: Path) -> None:
    write_vllm(tmp_path, make_heads())
    change_config(tmp_path, original_lm_head=True)
    assert "tensor 'lm_heads.1.weight', 'lm_heads.2.weight' is no part of" in error(tmp_path)


def test_left_over_tensor_with_a_prefix_in_a_merged_model(tmp_path: Path) -> None:
    tensors = backbone_tensors() | sequential_tensors(make_heads(), "medusa_head.")
    tensors["medusa_head.norm.weight"] = torch.ones(8)
    write(tmp_path, tensors, None, "model.safetensors")
    assert "tensor 'medusa_head.norm.weight' is no part of" in error(tmp_path)


def test_huge_head_number(tmp_path: Path) -> None:
    name = "999999999999.0.linear.weight"
    message = sequential_fault(tmp_path, lambda t: t.update({name: torch.ones(8, 8)}))
    assert "numbered up to head 999999999999 and layer 0" in message


def test_mixed_formats(tmp_path: Path) -> None:
    tensors = sequential_tensors(make_heads()) | vllm_tensors(make_heads())
    assert "(sequential, vllm)" in error(write(tmp_path, tensors, None, "a.safetensors"))


def test_same_tensor_with_and_without_prefix(tmp_path: Path) -> None:
    tensors = sequential_tensors(make_heads()) | sequential_tensors(make_heads(), "medusa_head.")
    message = error(write(tmp_path, tensors, None, "a.safetensors"))
    assert "'0.0.linear.bias' and 'medusa_head.0.0.linear.bias' are the same part" in message


def test_same_tensor_in_two_files(tmp_path: Path) -> None:
    write(tmp_path, sequential_tensors(make_heads()), None, "a.safetensors")
    write(tmp_path, {"0.1.weight": torch.ones(20, 8)}, None, "b.safetensors")
    message = error(tmp_path)
    assert re.search(r"'0.1.weight' is in both \S*a.safetensors and \S*b.safetensors", message)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("0.0.linear.weight", (8, 4), "[8, 8]"),
        ("0.0.linear.weight", (8,), "[hidden_size, hidden_size]"),
        ("1.0.linear.weight", (8, 4), "[8, 8]"),
        ("0.0.linear.bias", (4,), "[8]"),
        ("2.0.linear.bias", (8, 1), "[8]"),
        ("0.1.weight", (20, 4), "[20, 8]"),
        ("0.1.weight", (20, 8, 1), "[vocab_size, 8]"),
        ("1.1.weight", (19, 8), "[20, 8]"),
    ],
)
def test_wrong_shape(tmp_path: Path, name: str, shape: tuple[int, ...], expected: str) -> None:
    message = sequential_fault(tmp_path, lambda t: t.update({name: torch.ones(shape)}))
    assert f"tensor '{name}' has shape {list(shape)}, expected {expected}" in message


def test_wrong_shape_of_all_blocks(tmp_path: Path) -> None:
    def fault(tensors: Tensors) -> None:
        for h in range(3):
            tensors[f"{h}.0.linear.weight"] = torch.ones(8, 4)

    message = sequential_fault(tmp_path, fault)
    assert "tensor '0.0.linear.weight' has shape [8, 4], expected [8, 8]" in message


def test_wrong_width_of_all_lm_heads(tmp_path: Path) -> None:
    def fault(tensors: Tensors) -> None:
        for h in range(3):
            tensors[f"{h}.1.weight"] = torch.ones(20, 4)

    message = sequential_fault(tmp_path, fault)
    assert "tensor '0.1.weight' has shape [20, 4], expected [20, 8]" in message


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.weight", (3, 8, 8)),
        ("blocks.bias", (2, 1, 8)),
        ("lm_head.down", (3, 2, 9)),
        ("lm_head.up", (3, 20, 3)),
        ("lm_head.up", (2, 20, 2)),
        ("token_map", (2, 3)),
        ("token_map", (0,)),
    ],
)
def test_wrong_shape_native(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    def fault(tensors: Tensors) -> None:
        tensors[name] = torch.ones(shape, dtype=tensors[name].dtype)

    message = native_fault(tmp_path, fault, lm_head="low_rank", draft_vocab_size=6)
    stored = name.replace("lm_head.", "lm_heads.")
    assert f"tensor '{stored}' has shape {list(shape)}, expected" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["1.0.linear.weight", "2.0.linear.bias", "0.1.weight"])
def test_not_finite(tmp_path: Path, value: float, name: str) -> None:
    message = sequential_fault(tmp_path, lambda t: t[name].view(-1)[-1:].fill_(value))
    assert f"tensor '{name}' holds NaN or infinite values" in message


@pytest.mark.parametrize(
    "extra",
    [
        "0.0.linear.weight_scale",
        "0.0.linear.input_scale",
        "0.0.linear.weight_scale_2",
        "1.1.weight_scale",
        "0.0.linear.qweight",
        "0.0.linear.weight_quantizer._amax",
    ],
)
def test_quantised_by_extra_tensors(tmp_path: Path, extra: str) -> None:
    tensors = backbone_tensors() | sequential_tensors(make_heads(), "medusa_heads.")
    tensors[f"medusa_heads.{extra}"] = torch.ones(1)
    message = error(write(tmp_path, tensors, None, "model.safetensors"))
    assert f"'medusa_heads.{extra}' belongs to quantised heads" in message
    assert "float16, bfloat16 or float32" in message


def test_quantised_backbone_is_no_matter(tmp_path: Path) -> None:
    tensors = backbone_tensors() | sequential_tensors(make_heads(), "medusa_heads.")
    tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(1)
    assert load_heads(write(tmp_path, tensors, None, "model.safetensors")).spec.num_heads == 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_by_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    def fault(tensors: Tensors) -> None:
        tensors["1.0.linear.weight"] = tensors["1.0.linear.weight"].to(dtype)

    message = sequential_fault(tmp_path, fault)
    assert f"tensor '1.0.linear.weight' has dtype {dtype}: quantised heads" in message


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
        ({"format": "vllm_medusa.heads/2"}, "format is 'vllm_medusa.heads/2'"),
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
    ("token_map", "expected"),
    [
        ([0, 1, 2, 3, 4, 20], "token_map holds token 20, outside the vocabulary of 20 tokens"),
        ([0, -1, 2, 3, 4, 5], "token_map holds token -1, outside"),
        ([0, 1, 2, 3, 4, 4], "token_map holds a token twice"),
        ([0, 1, 2], "truncated_vocab_size is 6, but the heads' tensors have 3"),
    ],
)
def test_bad_token_map(tmp_path: Path, token_map: list[int], expected: str) -> None:
    changed = {"token_map": torch.tensor(token_map)}
    message = vllm_fault(tmp_path, lambda tensors: tensors.update(changed), draft_vocab_size=6)
    assert expected in message


def test_lm_head_rows_fit_neither_token_map_nor_vocabulary(tmp_path: Path) -> None:
    def fault(tensors: Tensors) -> None:
        for h in range(3):
            tensors[f"lm_heads.{h}.weight"] = torch.ones(7, 8)

    message = vllm_fault(tmp_path, fault, draft_vocab_size=6)
    assert "the lm_heads have 7 rows, neither token_map's 6 nor the vocabulary's 20" in message


def test_token_map_without_lm_heads(tmp_path: Path) -> None:
    token_map = {"token_map": torch.arange(6)}
    message = vllm_fault(tmp_path, lambda tensors: tensors.update(token_map), lm_head="target")
    assert "token_map but no lm_head" in message


def test_token_map_of_floats(tmp_path: Path) -> None:
    token_map = {"token_map": torch.arange(6.0)}
    message = vllm_fault(tmp_path, lambda tensors: tensors.update(token_map), draft_vocab_size=6)
    assert "'token_map' has dtype torch.float32; save it as int64" in message


def test_speculators_maps_that_disagree(tmp_path: Path) -> None:
    def fault(tensors: Tensors) -> None:
        del tensors["token_map"]
        tensors["d2t"] = torch.arange(6)
        tensors["t2d"] = torch.ones(20, dtype=torch.bool)

    message = vllm_fault(tmp_path, fault, draft_vocab_size=6)
    assert "'d2t' and 't2d' name different tokens" in message


def test_speculators_map_alone(tmp_path: Path) -> None:
    def fault(tensors: Tensors) -> None:
        tensors["d2t"] = tensors.pop("token_map")

    assert "tensor 't2d' is missing" in vllm_fault(tmp_path, fault, draft_vocab_size=6)


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
