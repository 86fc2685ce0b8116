"""The engine's process: what it says is passed on, and its end is told in one line."""

import sys
from typing import Any

import pytest

from tests.data_fakes import make_model
from vllm_medusa.data.prompts import Prompt
from vllm_medusa.distill.answerers import answer_locally, answer_on_ray
from vllm_medusa.engines import engine, process
from vllm_medusa.errors import UserError
from vllm_medusa.target.settings import AnswerSettings

SHARDS = [
    (3, [Prompt("a", 1, "x"), Prompt("bb", 2, "y", category="math")]),
    (5, [Prompt("ccc", 3, "z")]),
]


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_WORKER", "tests.fake_engine")


def answer(conduct: str) -> tuple[list[Any], list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    answered = answer_locally(
        AnswerSettings(model=conduct), make_model(), SHARDS, lambda *counts: told.append(counts)
    )
    return [(index, [row.as_record() for row in rows]) for index, rows in answered], told


def record(identity: str, text: str) -> dict[str, Any]:
    return {
        "id": identity,
        "token_ids": [ord(text), 1, 10],
        "loss_mask": [False, True, True],
        "category": "math" if identity == "bb" else None,
    }


def test_rows_and_progress_are_passed_on() -> None:
    rows, told = answer("answers")
    assert rows == [(3, [record("a", "x"), record("bb", "y")]), (5, [record("ccc", "z")])]
    assert told == [(0, 0), (2, 7), (1, 7)]


def test_refusal_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^vLLM refuses refuses with these options: no such dtype$"
    ):
        answer("refuses")
    with pytest.raises(UserError, match=r"these options: cache too small$"):
        answer("gives up")


def test_crash_is_one_line_with_the_last_words() -> None:
    with pytest.raises(UserError) as error:
        answer("crashes")
    assert str(error.value) == (
        "vLLM failed on crashes: the process was killed by signal 9; its last message: "
        "'Fatal: out of luck'; finished shards are kept: run the same command again to continue"
    )


def test_module_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_WORKER", "tests.absent")
    with pytest.raises(UserError, match=r"ended with status 1; its last message: .*tests\.absent"):
        answer("answers")


def test_process_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_PATIENCE_S", 0.2)
    rows, _ = answer("lingers")
    assert len(rows) == 2


def test_reader_that_stops_ends_the_process() -> None:
    answered = answer_locally(
        AnswerSettings(model="answers"), make_model(), SHARDS, lambda *_: None
    )
    assert next(answered)[0] == 3
    answered.close()  # type: ignore[attr-defined]


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r'--ray needs Ray Data .*pip install "vllm-medusa\[ray\]"'):
        next(
            answer_on_ray(
                AnswerSettings(model="m"),
                SHARDS,
                lambda *_: None,
                address="local",
                num_workers=1,
            )
        )
