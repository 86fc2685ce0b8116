"""Turns are answered in turn, and a row holds what a server would have been fed."""

import hashlib
from typing import Any

import pytest

from tests.data_fakes import EchoTokenizer, echo_answer, make_model
from vllm_medusa.data.prompts import Prompt, Turn
from vllm_medusa.errors import UserError
from vllm_medusa.target.conversations import answer_prompts, first_request
from vllm_medusa.target.settings import answer_seed
from vllm_medusa.target.text import TemplateError


def chat(identity: str, *contents: str, system: str | None = None) -> Prompt:
    turns = [Turn("system", system)] if system else []
    for content in contents:
        turns += [Turn("user", content), Turn("assistant", "not the target's")]
    return Prompt(identity, 1, turns=tuple(turns))


class Log:
    """Answers, and remembers what was asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.seeds: list[int] = []

    def __call__(self, requests: list[list[int]], seeds: list[int]) -> list[list[int]]:
        self.batches.append([EchoTokenizer().decode(request) for request in requests])
        self.seeds += seeds
        return [echo_answer(request) for request in requests]


def test_conversation_is_one_row_with_the_answers_masked_in() -> None:
    log = Log()
    (row,) = answer_prompts([chat("c", "ab", "x", system="S")], make_model(), log, seed=0)
    first, second = "S:S\nU:ab\nA:", "U:x\nA:"
    assert log.batches == [[first], [f"{first}ba\n{second}"]]
    # An answer of the fake is the last user's text backwards, and "\n" is its end token.
    text = EchoTokenizer().decode(row.token_ids.tolist())
    assert text == f"{first}ba\n{second}x\n"
    answers = "".join(c for c, answered in zip(text, row.loss_mask, strict=True) if answered)
    assert answers == "ba\nx\n"
    assert row.num_answers == 2
    assert row.id == "c"


def test_text_is_continued_as_it_is() -> None:
    (row,) = answer_prompts([Prompt("t", 1, text="U:ab")], make_model(), Log(), seed=0)
    assert EchoTokenizer().decode(row.token_ids.tolist()) == "U:abba\n"
    assert row.loss_mask.tolist() == [False] * 4 + [True] * 3


def test_template_that_changes_what_was_said_starts_a_row() -> None:
    """As those do that drop an answer's thinking, or trim it."""
    log = Log()
    model = make_model(forget_answers=True)
    rows = answer_prompts([chat("c", "ab", "cd", "e")], model, log, seed=0)
    texts = [EchoTokenizer().decode(row.token_ids.tolist()) for row in rows]
    assert [row.id for row in rows] == ["c", "c#2", "c#3"]
    assert texts == ["U:ab\nA:ba\n", "U:ab\nU:cd\nA:dc\n", "U:ab\nU:cd\nU:e\nA:e\n"]
    assert [row.num_answer_tokens for row in rows] == [3, 3, 2]
    assert [batch[0] + "?" for batch in log.batches] == [
        text[: text.rindex(":") + 1] + "?" for text in texts
    ]


def test_first_turns_are_answered_together_then_second_ones() -> None:
    log = Log()
    prompts = [chat("a", "1", "2"), Prompt("b", 1, text="U:x"), chat("c", "3", "4", "5")]
    rows = answer_prompts(prompts, make_model(), log, seed=0)
    assert [len(batch) for batch in log.batches] == [3, 2, 1]
    assert [row.id for row in rows] == ["a", "b", "c"]
    assert [row.num_answers for row in rows] == [2, 1, 3]
    alone = [answer_prompts([prompt], make_model(), Log(), seed=0)[0] for prompt in prompts]
    assert [row.as_record() for row in rows] == [row.as_record() for row in alone]


def test_seed_depends_on_the_answer_alone() -> None:
    prompts = [chat("a", "1", "2"), chat("b", "3")]
    together, alone = Log(), Log()
    answer_prompts(prompts, make_model(), together, seed=7)
    answer_prompts(prompts[::-1], make_model(), alone, seed=7)
    assert together.seeds[:2] == alone.seeds[1::-1]
    assert len({*together.seeds}) == 3
    other = Log()
    answer_prompts(prompts, make_model(), other, seed=8)
    assert not {*other.seeds} & {*together.seeds}
    digest = hashlib.sha256(b"7\n0\na").hexdigest()
    assert together.seeds[0] == answer_seed(7, "a", 0) == int(digest[:16], 16) // 2


def test_conversation_ends_where_the_next_turn_leaves_no_room() -> None:
    prompt = chat("c", "ab", "x" * 30, "y")
    limit = len("U:ab\nA:ba\n" + "U:" + "x" * 30 + "\nA:")
    (row,) = answer_prompts([prompt], make_model(max_prompt_tokens=limit - 1), Log(), seed=0)
    assert row.num_answers == 1
    (row,) = answer_prompts([prompt], make_model(max_prompt_tokens=limit), Log(), seed=0)
    assert row.num_answers == 2


def test_first_request_is_what_is_answered_first() -> None:
    prompt = chat("c", "ab", "cd")
    log = Log()
    answer_prompts([prompt], make_model(), log, seed=0)
    assert EchoTokenizer().decode(first_request(prompt, make_model())) == log.batches[0][0]


def test_template_that_refuses_a_later_turn_is_noticed_before_any_answer() -> None:
    prompt = chat("c", "ab", "refuse")
    with pytest.raises(TemplateError, match="the chat template refuses it"):
        first_request(prompt, make_model())
    with pytest.raises(UserError, match="prompt 'c': the chat template refuses it"):
        answer_prompts([prompt], make_model(), Log(), seed=0)


def test_nothing_asked_nothing_answered() -> None:
    def fail(*_: Any) -> list[list[int]]:
        raise AssertionError

    assert answer_prompts([], make_model(), fail, seed=0) == []
