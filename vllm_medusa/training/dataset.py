"""Dataset rows in memory, checked, and split into rows to learn from and rows held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vllm_medusa.data.rows import Row, read_rows
from vllm_medusa.errors import UserError

#: Most held-out rows: more would take time and measure no better.
MAX_HELD_OUT_ROWS = 512


@dataclass(frozen=True)
class Dataset:
    """Rows to learn from and rows held out.

    Attributes:
        train, held_out: the rows.
        fingerprint: hash of all tokens and masks, in order.
        num_cut: rows that were cut to the target's largest position.
        num_without_answer: rows left out because no token of theirs is an answer.
    """

    train: list[Row]
    held_out: list[Row]
    fingerprint: str
    num_cut: int
    num_without_answer: int


def load_dataset(path: Path, *, vocab_size: int, max_tokens: int, held_out: float) -> Dataset:
    """Read, check and split the rows of a directory.

    Whether a row is held out depends on its id and the ids of the others alone, so the split stays
    the same however the rows lie in shards.

    Args:
        path: directory of shards.
        vocab_size: of the target; every token id must be below it.
        max_tokens: the target's largest number of positions; longer rows are cut to it.
        held_out: share of the rows to hold out; at least one row and at most `MAX_HELD_OUT_ROWS`.

    Raises:
        UserError: the directory or a shard cannot be read, rows do not fit the target, or too few
            rows have answers.
    """
    found = list(fitting_rows(path, vocab_size=vocab_size, max_tokens=max_tokens))
    rows = [(hashlib.sha256(row.id.encode()).digest(), row) for row, _ in found if row.num_learnt]
    # By id, so that several answers to one prompt are on the same side.
    order = sorted({key for key, _ in rows})
    num_held_out = min(MAX_HELD_OUT_ROWS, max(1, round(held_out * len(order))))
    if len(order) <= num_held_out:
        raise UserError(
            f"{path}: {len(rows)} of {len(found)} rows hold an answer to learn, too few to hold "
            "some out; give more rows (vllm-medusa distill makes them)"
        )
    held = set(order[:num_held_out])
    return Dataset(
        train=[row for key, row in rows if key not in held],
        held_out=[row for key, row in rows if key in held],
        fingerprint=fingerprint_of(row for row, _ in found),
        num_cut=sum(is_cut for _, is_cut in found),
        num_without_answer=len(found) - len(rows),
    )


def learnt_whole(row: Row) -> Row:
    """Return a row whose tokens are all learnt, not those of its answers alone."""
    return replace(row, loss_mask=np.ones_like(row.loss_mask))


def fingerprint_of(rows: Iterable[Row]) -> str:
    """Return a hash of all tokens and masks, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.token_ids.tobytes() + row.loss_mask.tobytes() + b"|")
    return digest.hexdigest()[:16]


def fitting_rows(path: Path, *, vocab_size: int, max_tokens: int) -> Iterator[tuple[Row, bool]]:
    """Yield the rows of a directory, cut to the target's positions, and whether they were cut.

    Raises:
        UserError: the directory or a shard cannot be read, or a token is not one of the target's.
    """
    for row in read_rows(path):
        if row.token_ids.max() >= vocab_size:
            raise UserError(
                f"{path}: row {row.id!r} holds token {row.token_ids.max()}, the target has "
                f"{vocab_size} tokens; use rows of the target's own tokenizer (vllm-medusa distill)"
            )
        cut = replace(
            row, token_ids=row.token_ids[:max_tokens], loss_mask=row.loss_mask[:max_tokens]
        )
        yield cut, len(row.token_ids) > max_tokens
