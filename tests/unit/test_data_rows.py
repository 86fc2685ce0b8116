"""Shards are written whole or not at all, and what is wrong with one is said."""

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_fakes import fork
from vllm_medusa.data.rows import (
    SHARD_FORMATS,
    Row,
    ShardFormat,
    list_shards,
    read_rows,
    shard_path,
    temperature_of,
    write_shard,
)
from vllm_medusa.errors import UserError
from vllm_medusa.files import remove_temporary_files, write_atomically

RECORD = {"id": "a", "token_ids": [5, 6], "loss_mask": [False, True]}


def row(identity: str, length: int = 3) -> Row:
    return Row(identity, np.arange(length, dtype=np.int32), np.arange(length) % 2 == 1)


def records(path: Path) -> list[dict[str, Any]]:
    return [row.as_record() for row in read_rows(path)]


@pytest.mark.parametrize("shard_format", SHARD_FORMATS)
def test_rows_come_back_in_order(tmp_path: Path, shard_format: ShardFormat) -> None:
    shards = [[row("a"), row("ü\n", 1)], [row("c", 7)], [row("d")]]
    for index in (2, 0, 1):
        write_shard(shard_path(tmp_path, index, shard_format), shards[index])
    assert records(tmp_path) == [row.as_record() for shard in shards for row in shard]
    assert records(shard_path(tmp_path, 1, shard_format)) == [row("c", 7).as_record()]
    read = next(read_rows(tmp_path))
    assert (read.token_ids.dtype, read.loss_mask.dtype) == (np.int32, np.bool_)


def test_columns_of_parquet_have_the_documented_types(tmp_path: Path) -> None:
    write_shard(tmp_path / "part-00000.parquet", [row("a")])
    schema = pq.read_schema(tmp_path / "part-00000.parquet")
    assert schema.names == ["id", "token_ids", "loss_mask", "category"]
    types = [pa.string(), pa.list_(pa.int32()), pa.list_(pa.bool_()), pa.string()]
    assert schema.types == types


@pytest.mark.parametrize("shard_format", SHARD_FORMATS)
def test_categories_come_back(tmp_path: Path, shard_format: ShardFormat) -> None:
    path = shard_path(tmp_path, 0, shard_format)
    write_shard(path, [replace(row("a"), category="math"), row("b")])
    assert [read.category for read in read_rows(path)] == ["math", None]


def test_rows_of_before_there_were_categories(tmp_path: Path) -> None:
    for shard_format, write in (("parquet", pq.write_table), ("jsonl", None)):
        path = tmp_path / f"part-00000.{shard_format}"
        if write is None:
            path.write_text(json.dumps(RECORD) + "\n")
        else:
            write(pa.table({name: [value] for name, value in RECORD.items()}), path)
        assert [read.category for read in read_rows(path)] == [None]


def test_temperature_of_a_data_set(tmp_path: Path) -> None:
    """Without provenance, or with one that says nothing of it, rows count as greedy."""
    path = tmp_path / "distill.json"
    assert temperature_of(tmp_path) == 0
    for content, temperature in (
        ("{}", 0),
        ('{"made_from": {}}', 0),
        ('{"made_from": {"temperature": 0.8}}', 0.8),
    ):
        path.write_text(content)
        assert temperature_of(tmp_path) == temperature
    for content, reason in (
        ('{"made_from": {"temperature": null}}', "has no temperature that can be read"),
        ('{"made_from": 3}', "has no temperature that can be read"),
        ("{", "cannot be read"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=reason):
            temperature_of(tmp_path)


def test_answers_are_counted() -> None:
    mask = [True, True, False, False, True, False, True]
    answered = Row("a", np.zeros(7, np.int32), np.array(mask))
    assert (answered.num_answers, answered.num_answer_tokens) == (3, 4)
    assert Row("a", np.zeros(2, np.int32), np.zeros(2, np.bool_)).num_answers == 0


def test_incomplete_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        read_rows(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no shards"):
        read_rows(tmp_path)
    write_shard(shard_path(tmp_path, 1, "jsonl"), [row("b")])
    with pytest.raises(UserError, match="1 of 2 shards are missing, the first is number 0"):
        read_rows(tmp_path)
    write_shard(shard_path(tmp_path, 0, "jsonl"), [row("a")])
    assert len(records(tmp_path)) == 2
    (tmp_path / "distill.json").write_text('{"num_shards": 4}')
    with pytest.raises(UserError, match="2 of 4 shards are missing, the first is number 2"):
        read_rows(tmp_path)
    (tmp_path / "distill.json").write_text("[]")
    with pytest.raises(UserError, match="has no number of shards"):
        read_rows(tmp_path)


def test_two_files_of_one_shard_are_refused(tmp_path: Path) -> None:
    for shard_format in SHARD_FORMATS:
        write_shard(shard_path(tmp_path, 0, shard_format), [row("a")])
    with pytest.raises(UserError, match=r"part-00000.*part-00000.*keep one"):
        list_shards(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"token_ids": None}, "lacks token_ids"),
        ({"id": 3}, "id is not a string"),
        ({"category": 3}, "category is neither a string nor null"),
        ({"token_ids": [1, -1]}, "must hold int32"),
        ({"token_ids": [1, 2**31]}, "must hold int32"),
        ({"token_ids": [1, 2.5]}, "must hold int32"),
        ({"token_ids": [1, "x"]}, "must hold int32"),
        ({"token_ids": [[1], [2]]}, r"shape \[2, 1\]"),
        ({"token_ids": [[1], 2]}, "inhomogeneous"),
        ({"token_ids": [1]}, r"shape \[1\], loss_mask \[2\]"),
        ({"token_ids": [], "loss_mask": []}, "not empty"),
        ({"loss_mask": [0, 1]}, "must hold true and false"),
    ],
)
def test_malformed_row_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "part-00000.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (RECORD, RECORD | change)))
    with pytest.raises(UserError, match=rf"part-00000.jsonl: row 2: .*{reason}"):
        records(tmp_path)


def test_malformed_files_are_named(tmp_path: Path) -> None:
    for name, content, reason in (
        ("part-00000.jsonl", "{", "line 1 is not JSON"),
        ("part-00000.jsonl", "[]", "line 1 is not a JSON object"),
        ("part-00000.parquet", "PAR1", "not a Parquet file"),
        ("rows.csv", "a,b", r"neither in .parquet nor in .jsonl"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=reason):
            records(tmp_path / name)
    pq.write_table(pa.table({"id": ["a"], "tokens": [[1]]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="lacks the columns token_ids, loss_mask"):
        records(tmp_path / "x.parquet")
    pq.write_table(
        pa.table({"id": ["a"], "token_ids": [1], "loss_mask": [[True]]}), tmp_path / "x.parquet"
    )
    with pytest.raises(UserError, match="column token_ids is of type int64, not a list"):
        records(tmp_path / "x.parquet")
    lists = pa.array([None, [1]], pa.list_(pa.int32()))
    pq.write_table(
        pa.table({"id": ["a", "b"], "token_ids": lists, "loss_mask": [[True], [True]]}),
        tmp_path / "x.parquet",
    )
    with pytest.raises(UserError, match="row 1: lacks token_ids"):
        records(tmp_path / "x.parquet")


@pytest.mark.parametrize("shard_format", SHARD_FORMATS)
def test_full_disk_changes_nothing(tmp_path: Path, shard_format: ShardFormat) -> None:
    path = shard_path(tmp_path, 0, shard_format)
    write_shard(path, [row("a")])
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        with pytest.raises(UserError, match=r"part-00000.* cannot be written \(File too large\)"):
            write_shard(path, [row(str(i), 999) for i in range(999)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_directory_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        write_shard(tmp_path / "absent" / "part-00000.jsonl", [row("a")])


def test_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def die(file: BinaryIO) -> None:
        file.write(b"x" * 99)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(fork(lambda: write_atomically(path, die)), 0)
    (left,) = tmp_path.iterdir()
    assert (left.name, left.stat().st_size) == (".file.medusa-tmp", 99)
    remove_temporary_files(tmp_path)
    assert not list(tmp_path.iterdir())
    write_atomically(path, lambda file: file.write(b"y"))
    assert path.read_bytes() == b"y"
