"""Heads opened: what is read when, and that a part equals that part of the whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import (
    make_heads,
    sequential_tensors,
    write,
    write_fasterdecoding,
    write_merged,
    write_modelopt,
    write_native,
    write_vllm,
)
from vllm_medusa.errors import UserError
from vllm_medusa.heads import HeadsCheckpoint, HeadsReader, load_heads
from vllm_medusa.heads.io import files

MIB = 2**20


def write_sparse(directory: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of float32 zeros that takes up no disk, however large."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with (directory / "medusa_lm_head.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(file.tell() + end)
    return directory


def write_large(directory: Path) -> Path:
    """Four heads of 500 MiB."""
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(4):
        shapes |= {f"{head}.0.linear.weight": (1024, 1024), f"{head}.1.weight": (128_000, 1024)}
    return write_sparse(directory, shapes)


def resident_bytes() -> int:
    """Memory of this process, pages of mapped files included."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    write_large(tmp_path)
    before = resident_bytes()
    reader = HeadsReader(tmp_path)
    assert resident_bytes() - before < 16 * MIB
    assert (reader.spec.num_heads, reader.spec.vocab_size) == (4, 128_000)
    assert (reader.spec.lm_head, reader.spec.dtype) == ("own", torch.float32)


def test_rows_are_all_that_is_read(tmp_path: Path) -> None:
    reader = HeadsReader(write_large(tmp_path))
    before = resident_bytes()
    rows = reader.read_rows(2, 64_000, 72_000)
    assert rows.shape == (8_000, 1024)
    assert 31 * MIB < resident_bytes() - before < 64 * MIB
    del rows
    assert resident_bytes() - before < 16 * MIB


def test_opening_a_torch_file_reads_no_values(tmp_path: Path) -> None:
    tensors = sequential_tensors(make_heads(num_heads=1))
    tensors["0.1.weight"] = torch.zeros(8_000_000, 8)
    torch.save(tensors, tmp_path / "medusa_lm_head.pt")
    del tensors
    before = resident_bytes()
    assert HeadsReader(tmp_path).spec.vocab_size == 8_000_000
    assert resident_bytes() - before < 16 * MIB


@pytest.mark.parametrize("file", ["medusa_lm_head.safetensors", "medusa_lm_head.pt"])
def test_values_are_refused_when_they_are_read(tmp_path: Path, file: str) -> None:
    heads = make_heads(num_layers=2)
    heads.tensors["lm_head.weight"][1, 15, 3] = torch.nan
    heads.tensors["blocks.bias"][2, 1, 0] = torch.inf
    reader = HeadsReader(write_fasterdecoding(tmp_path, heads, file))
    reader.read_rows(0, 0, 20)
    reader.read_rows(1, 0, 15)
    reader.read_rows(1, 16, 20)
    reader.read_blocks(2)
    with pytest.raises(UserError, match=r"tensor '1.2.weight' holds NaN or infinite values"):
        reader.read_rows(1, 15, 16)
    with pytest.raises(UserError, match=r"tensor '2.1.linear.bias' holds NaN or infinite"):
        reader.read_blocks()
    with pytest.raises(UserError, match="holds NaN or infinite values"):
        load_heads(tmp_path)


Write = Callable[[Path, HeadsCheckpoint], Path]
CASES: list[tuple[Write, dict[str, Any]]] = [
    (write_fasterdecoding, {}),
    (write_merged, {"num_layers": 2}),
    (write_modelopt, {}),
    (write_vllm, {"lm_head": "common", "has_bias": False}),
    (write_vllm, {"draft_vocab_size": 7}),
    (write_native, {"num_layers": 2}),
    (write_native, {"lm_head": "common"}),
    (write_native, {"lm_head": "common", "root_size": 6, "selector_rank": 2}),
    (write_native, {"lm_head": "common", "prefix_window": 7}),
    (write_native, {"lm_head": "low_rank", "draft_vocab_size": 7, "rank": 3}),
]


@pytest.mark.parametrize(("write_heads", "options"), CASES)
def test_parts_are_those_of_the_whole(
    tmp_path: Path, write_heads: Write, options: dict[str, Any]
) -> None:
    heads = make_heads(**options)
    reader = HeadsReader(write_heads(tmp_path, heads))
    blocks = reader.read_blocks(2)
    assert blocks.keys() == {name for name in heads.tensors if name.startswith(("blocks.", "root"))}
    selector = reader.read_selector(2)
    assert selector.keys() == {name for name in heads.tensors if name.startswith("selector.")}
    for name, tensor in selector.items():
        whole = heads.tensors[name]
        assert torch.equal(tensor, whole[:2] if name == "selector.depth" else whole)
    for name, tensor in blocks.items():
        assert torch.equal(tensor, heads.tensors[name][:2])
    rows = heads.tensors["lm_head.up" if heads.spec.lm_head == "low_rank" else "lm_head.weight"]
    for head in range(3):
        own = rows if heads.spec.lm_head == "common" else rows[head]
        for start, stop in ((0, len(own)), (0, 3), (3, 7), (6, 7), (4, 4)):
            assert torch.equal(reader.read_rows(head, start, stop), own[start:stop])


def test_rows_of_full_lm_heads_are_those_of_the_token_map(tmp_path: Path) -> None:
    """As the FR-Spec tools write them: lm_heads of the whole vocabulary beside a token map."""
    whole = make_heads()
    heads = make_heads(draft_vocab_size=6)
    heads.tensors["lm_head.weight"] = whole.tensors["lm_head.weight"]
    reader = HeadsReader(write_vllm(tmp_path, heads))
    token_map = heads.tensors["token_map"]
    assert reader.token_map is not None
    assert torch.equal(reader.token_map, token_map)
    expected = whole.tensors["lm_head.weight"][2, token_map[2:5]]
    assert torch.equal(reader.read_rows(2, 2, 5), expected)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((16, 20), "the heads are for hidden size 8, the target model has 16; use heads"),
        ((8, 32), "the heads are for vocabulary size 20, the target model has 32; use heads"),
    ],
)
def test_other_target(tmp_path: Path, sizes: tuple[int, int], expected: str) -> None:
    reader = HeadsReader(write_fasterdecoding(tmp_path, make_heads()))
    with pytest.raises(UserError, match=expected):
        reader.check_target(*sizes)
    reader.check_target(8, 20)
    reader.check_target(None, None)


def test_every_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    original = files.open_tensor_file

    def record(path: Path) -> files.TensorFile:
        opened.append(path)
        return original(path)

    monkeypatch.setattr(files, "open_tensor_file", record)
    write(tmp_path, sequential_tensors(make_heads()), None, "heads.safetensors")
    load_heads(tmp_path)
    assert opened == [tmp_path / "heads.safetensors"]
