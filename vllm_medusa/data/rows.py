"""Rows of token ids with a loss mask, in shards: `distill` writes them, other tools read them.

A data set is a directory of shards `part-00000.parquet`, `part-00001.parquet`, ... or the same with
`.jsonl`, of columns `id` (string), `token_ids` (list of int32), `loss_mask` (list of bool) and
`category` (string or null; may be missing), and `distill.json`, which says how they were made and
how many there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from vllm_medusa.errors import UserError
from vllm_medusa.files import write_atomically

ShardFormat = Literal["parquet", "jsonl"]
SHARD_FORMATS: tuple[ShardFormat, ...] = ("parquet", "jsonl")
PROVENANCE_FILE = "distill.json"
COLUMNS = ("id", "token_ids", "loss_mask")
CATEGORY = "category"

_SHARD_NAME = re.compile(r"part-(\d{5,})\.(parquet|jsonl)")
_MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of tokens, prompts and answers.

    Attributes:
        id: of the prompt that it answers.
        token_ids: [T] int32.
        loss_mask: [T] bool, true on the answers' tokens, their end tokens included.
        category: of the prompt, if it has one.
    """

    id: str
    token_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    category: str | None = None

    @property
    def num_answers(self) -> int:
        """Number of answers: runs of tokens of the loss mask."""
        starts = self.loss_mask[1:] & ~self.loss_mask[:-1]
        return int(starts.sum()) + int(self.loss_mask[0])

    @property
    def num_answer_tokens(self) -> int:
        """Number of tokens of the loss mask."""
        return int(self.loss_mask.sum())

    @property
    def num_learnt(self) -> int:
        """Number of answer tokens that a position of the row can predict."""
        return int(self.loss_mask[1:].sum())

    def answers(self) -> list[tuple[int, int]]:
        """Return the answers as ranges [start, stop) of tokens; a row of several turns has several.

        An answer at the start of the row loses its first token, which no position predicts.
        """
        flags = np.concatenate(([False], self.loss_mask, [False]))
        flags[1] = False
        edges = np.flatnonzero(flags[1:] != flags[:-1])
        return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    def as_record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "id": self.id,
            "token_ids": self.token_ids.tolist(),
            "loss_mask": self.loss_mask.tolist(),
            CATEGORY: self.category,
        }

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Row:
        """Make a row of a mapping with its columns: lists or arrays.

        Raises:
            ValueError: a column is missing, of another type, or of another length than it should.
        """
        missing = [column for column in COLUMNS if record.get(column) is None]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}")
        token_ids, loss_mask = np.asarray(record["token_ids"]), np.asarray(record["loss_mask"])
        if token_ids.ndim != 1 or token_ids.shape != loss_mask.shape or not token_ids.size:
            raise ValueError(
                f"token_ids has shape {list(token_ids.shape)}, loss_mask {list(loss_mask.shape)}, "
                "but both must be lists of one length, not empty"
            )
        if token_ids.dtype.kind != "i" or token_ids.min() < 0 or token_ids.max() > _MAX_INT32:
            raise ValueError("token_ids must hold int32 values from 0 on")
        if loss_mask.dtype != np.bool_:
            raise ValueError("loss_mask must hold true and false only")
        if not isinstance(record["id"], str):
            raise ValueError("id is not a string")
        category = record.get(CATEGORY)
        if not isinstance(category, str | None):
            raise ValueError(f"{CATEGORY} is neither a string nor null")
        return Row(record["id"], token_ids.astype(np.int32), loss_mask, category)


def shard_path(directory: Path, index: int, shard_format: ShardFormat) -> Path:
    """Return where a data set has its shard of that index, from 0."""
    return directory / f"part-{index:05d}.{shard_format}"


def list_shards(directory: Path) -> dict[int, Path]:
    """Return a directory's shards by index, in order."""
    found: dict[int, Path] = {}
    for path in directory.iterdir():
        if match := _SHARD_NAME.fullmatch(path.name):
            index = int(match[1])
            if index in found:
                raise UserError(f"{directory}: {found[index].name} and {path.name}: keep one")
            found[index] = path
    return dict(sorted(found.items()))


def write_shard(path: Path, rows: Sequence[Row]) -> None:
    """Write a shard completely or not at all.

    Args:
        path: ends in `.parquet` or `.jsonl`, which decides the format.
        rows: its rows, in order.

    Raises:
        UserError: it cannot be written, for instance on a full disk.
    """
    write = _write_parquet if path.suffix == ".parquet" else _write_jsonl
    write_atomically(path, lambda file: write(file, rows))


def read_rows(path: str | Path) -> Iterator[Row]:
    """Read the rows of a data set, or of one shard, in order.

    Args:
        path: the directory, or the shard's file.

    Raises:
        UserError: at once if the directory holds no shards, or not all of them; while reading if a
            shard is malformed. The message names the file and the row.
    """
    path = Path(path)
    shards = [path] if path.is_file() else _all_shards(path)
    return (row for shard in shards for row in read_shard(shard))


def temperature_of(directory: str | Path) -> float:
    """Return the temperature at which `distill` sampled the answers of a data set.

    Args:
        directory: of the data set.

    Returns:
        0 for greedy answers, and where no `distill.json` says how they were made.

    Raises:
        UserError: `distill.json` cannot be read.
    """
    provenance = Path(directory) / PROVENANCE_FILE
    if not provenance.is_file():
        return 0.0
    made_from = _read_provenance(provenance).get("made_from", {})
    try:
        return float(made_from.get("temperature", 0))
    except (ValueError, TypeError, AttributeError) as exc:
        raise UserError(f"{provenance}: has no temperature that can be read ({exc!r})") from None


def read_shard(path: Path) -> Iterator[Row]:
    """Read the rows of one shard, in order.

    Raises:
        UserError: no such file, or a malformed one.
    """
    read = {".parquet": _read_parquet, ".jsonl": _read_jsonl}.get(path.suffix)
    if read is None:
        raise UserError(f"{path}: its name ends neither in .parquet nor in .jsonl")
    try:
        for number, record in enumerate(read(path), 1):
            try:
                row = Row.from_record(record)
            except ValueError as exc:
                raise UserError(f"{path}: row {number}: {exc}") from None
            yield row
    except OSError as exc:
        raise UserError(f"{path}: cannot be read ({exc})") from None


def _all_shards(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise UserError(f"rows {str(directory)!r}: no such directory; vllm-medusa distill makes it")
    shards = list_shards(directory)
    wanted = len(shards)
    provenance = directory / PROVENANCE_FILE
    if provenance.is_file():
        try:
            wanted = int(_read_provenance(provenance)["num_shards"])
        except (ValueError, KeyError, TypeError) as exc:
            raise UserError(f"{provenance}: has no number of shards ({exc!r})") from None
    if not shards:
        raise UserError(f"{directory}: holds no shards; vllm-medusa distill makes them")
    wanted = max(wanted, max(shards) + 1)
    missing = [index for index in range(wanted) if index not in shards]
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} of {wanted} shards are missing, the first is number "
            f"{missing[0]}; run the same distill command again to complete them"
        )
    return list(shards.values())


def _read_provenance(path: Path) -> dict[str, Any]:
    """Return what `distill.json` says.

    Raises:
        UserError: it is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UserError(f"{path}: cannot be read ({exc}); run distill again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: has no number of shards, because it is not a JSON object")
    return found


def _write_jsonl(file: BinaryIO, rows: Sequence[Row]) -> None:
    for row in rows:
        file.write(json.dumps(row.as_record(), ensure_ascii=False).encode() + b"\n")


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
            except ValueError as exc:
                raise UserError(f"{path}: line {number} is not JSON ({exc})") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}: line {number} is not a JSON object")
            yield record


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            'Parquet needs pyarrow: pip install "vllm-medusa[train]", or use --format jsonl'
        ) from None
    return pyarrow, pyarrow.parquet


def _write_parquet(file: BinaryIO, rows: Sequence[Row]) -> None:
    pa, pq = _pyarrow()
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("token_ids", pa.list_(pa.int32())),
            ("loss_mask", pa.list_(pa.bool_())),
            (CATEGORY, pa.string()),
        ]
    )
    columns = {
        "id": [row.id for row in rows],
        "token_ids": [row.token_ids for row in rows],
        "loss_mask": [row.loss_mask for row in rows],
        CATEGORY: [row.category for row in rows],
    }
    pq.write_table(pa.table(columns, schema=schema), file)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    pa, pq = _pyarrow()
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as exc:
        raise UserError(f"{path}: not a Parquet file that can be read ({exc})") from None
    missing = [column for column in COLUMNS if column not in table.column_names]
    if missing:
        raise UserError(f"{path}: lacks the columns {', '.join(missing)}")
    for name in COLUMNS[1:]:
        kind = table.schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise UserError(f"{path}: column {name} is of type {kind}, not a list")
    # Rows that were written before there were categories lack this column.
    categories = [CATEGORY] if CATEGORY in table.column_names else []
    for batch in table.select([*COLUMNS, *categories]).to_batches():
        identities, token_ids, loss_masks, *rest = batch.columns
        for index in range(batch.num_rows):
            yield {
                "id": identities[index].as_py(),
                "token_ids": _array(token_ids[index]),
                "loss_mask": _array(loss_masks[index]),
                CATEGORY: rest[0][index].as_py() if rest else None,
            }


def _array(scalar: Any) -> Any:
    """The values of a list as an array: Python integers would take ten times the memory."""
    return scalar.values.to_numpy(zero_copy_only=False) if scalar.is_valid else None
