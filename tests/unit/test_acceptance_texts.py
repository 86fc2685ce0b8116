"""Which positions of an answer count, on answers written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.training import document, save_llama
from vllm_medusa.acceptance.texts import Answer, Counted, counted_positions, loop_start, text_of_row
from vllm_medusa.target.config import read_target

TWELVE = list(range(100, 112))


@pytest.mark.parametrize(
    ("has_ended", "num_heads", "total"),
    [
        # A step begins at every token but the last.
        (True, 3, 11),
        (True, 20, 11),
        # A step of 4 tokens that begins at token 7 emits token 11, the last that is known.
        (False, 3, 8),
        (False, 10, 1),
        (False, 11, 0),
        (False, 20, 0),
    ],
)
def test_positions_of_twelve_tokens(has_ended: bool, num_heads: int, total: int) -> None:
    assert counted_positions(TWELVE, has_ended, num_heads) == Counted(total, total)


@pytest.mark.parametrize("has_ended", [True, False])
def test_text_before_a_loop_counts_as_if_cut_there(has_ended: bool) -> None:
    tokens = [*TWELVE, *range(20), *range(20)]  # loops from token 32 on
    assert loop_start(tokens) == 32
    counted = counted_positions(tokens, has_ended, 3)
    assert counted.before_loop == counted_positions(tokens[:32], False, 3).total == 28
    assert (
        counted.total == counted_positions(tokens, has_ended, 3).total == 51 - 3 * (not has_ended)
    )


def test_one_token_has_no_position() -> None:
    for has_ended in (True, False):
        assert counted_positions([5], has_ended, 2) == Counted(0, 0)


def test_an_answer_of_a_row_has_ended_if_its_last_token_ends_answers() -> None:
    row = document([1, 2, 3, 9, 4, 5, 6, 8, 9, 7], [0, 1, 1, 1, 0, 1, 1, 0, 1, 1])
    text = text_of_row(row, {8, 9})
    assert list(text.answers) == [Answer(1, 4, True), Answer(5, 7, False), Answer(8, 10, False)]
    assert [text.tokens_of(answer) for answer in text.answers] == [[2, 3, 9], [5, 6], [9, 7]]
    assert text.token_ids == row.token_ids.tolist()


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        (None, {7}),
        ({}, {7}),
        ({"eos_token_id": 3}, {3}),
        ({"eos_token_id": [3, 5]}, {3, 5}),
        ({"eos_token_id": None}, set()),
    ],
)
def test_end_tokens_of_a_model(
    tmp_path: Path, generation_config: dict[str, object] | None, expected: set[int]
) -> None:
    model = save_llama(tmp_path / "model", eos_token_id=7)
    path = model / "generation_config.json"
    path.unlink(missing_ok=True)
    if generation_config is not None:
        path.write_text(json.dumps(generation_config))
    assert read_target(str(model)).end_tokens == expected


def test_a_model_may_name_no_end_token(tmp_path: Path) -> None:
    assert read_target(str(save_llama(tmp_path / "model"))).end_tokens == set()
    assert not text_of_row(document([1, 2], [0, 1]), set()).answers[0].has_ended


def test_rows_without_answer() -> None:
    assert text_of_row(document([1, 2], [0, 0]), {2}).answers == []
    assert np.array_equal(document([1, 2], [1, 0]).answers(), [])
