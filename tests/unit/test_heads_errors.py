"""Each fault of the heads' tensors is one line that names the tensor and what to do."""

import re
from collections.abc import Callable
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
    vllm_tensors,
    write,
    write_native,
    write_vllm,
)
from vllm_medusa.heads import load_heads

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


PREFIX = ["prefix.query", "prefix.key_value", "prefix.output", "prefix.bias"]


@pytest.mark.parametrize("name", ["selector.parent", "selector.child", "selector.depth", *PREFIX])
def test_missing_part_of_a_selector_or_of_prefix_attention(tmp_path: Path, name: str) -> None:
    kind = {"selector_rank": 2, "prefix_window": 7}
    message = native_fault(tmp_path, lambda tensors: tensors.pop(name), **kind)
    assert f"tensor '{name}' is missing for stacked heads" in message


def test_selector_of_another_vocabulary(tmp_path: Path) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("selector.parent", "selector.child"):
            tensors[name] = tensors[name][:19]

    message = native_fault(tmp_path, shorten, selector_rank=2)
    assert "the selector's tables have 19 rows, the vocabulary has 20" in message


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("prefix.query", (6, 8), "'prefix.query' has shape [6, 8]; expected a multiple of 2"),
        ("prefix.query", (6, 15), "'prefix.query' has shape [6, 15]; expected a multiple of 2"),
        ("prefix.bias", (4, 7), "expected a multiple of 4 attention heads, and hidden size 8"),
        ("prefix.key_value", (3, 6, 14), "expected [2, 6, 14]"),
        ("prefix.output", (9, 6), "expected [8, 6]"),
    ],
)
def test_prefix_attention_of_other_sizes(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(shape)
        if name == "prefix.query":
            tensors["prefix.key_value"] = torch.zeros(2, *shape)

    assert message in native_fault(tmp_path, change, prefix_window=7, root_size=6)


def test_root_matrices_of_other_heads(tmp_path: Path) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors["root.weight"] = tensors["root.weight"][:2]

    assert "expected [3, 8, " in native_fault(tmp_path, shorten, root_size=6)


@pytest.mark.parametrize(
    "name",
    [
        "0.1.bias",
        "extra.weight",
        "3.weight",
        "0.0.linear.gain",
        "token_map",
        "lm_head.weight",
        "root.weight",
    ],
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
