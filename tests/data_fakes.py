"""Stand-ins for a model in the tests of `vllm_medusa.data`: no weights, no vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from vllm_medusa.data.rows import Row
from vllm_medusa.distill.answerers import Report, Shard
from vllm_medusa.target.conversations import answer_prompts
from vllm_medusa.target.settings import AnswerSettings
from vllm_medusa.target.text import AnsweringModel

DEMO_TEXTS = [f"U:{'abcdefghij'[i:]}" for i in range(10)]
_NAMES = {"system": "S", "user": "U", "assistant": "A"}


class EchoTokenizer:
    """A token a character; messages are lines `S:...`, `U:...`, `A:...`.

    Args:
        forget_answers: leave earlier answers out of the conversation.
    """

    chat_template = "there is one"

    def __init__(self, forget_answers: bool = False) -> None:
        self._forget_answers = forget_answers

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        text = "".join(map(chr, token_ids))
        return text.removesuffix("\n") if skip_special_tokens else text

    def apply_chat_template(
        self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        assert add_generation_prompt
        if any(message["content"] == "refuse" for message in messages):
            raise TemplateError("not this")
        kept = [m for m in messages if m["role"] != "assistant" or not self._forget_answers]
        return "".join(f"{_NAMES[m['role']]}:{m['content']}\n" for m in kept) + "A:"


def make_model(
    max_prompt_tokens: int = 1000, forget_answers: bool = False, weights: str = "fake"
) -> AnsweringModel:
    tokenizer: Any = EchoTokenizer(forget_answers)
    return AnsweringModel(
        tokenizer=tokenizer,
        vocab_size=256,
        max_model_len=2000,
        max_prompt_tokens=max_prompt_tokens,
        fingerprint=weights,
    )


def echo_answer(request: list[int]) -> list[int]:
    """The last user's text backwards, and a line's end as the end token."""
    text = "".join(map(chr, request)).rpartition("U:")[2].removesuffix("A:").removesuffix("\n")
    return [ord(character) for character in text[::-1] + "\n"]


def answer_without_engine(
    settings: AnswerSettings, model: AnsweringModel, shards: Sequence[Shard], report: Report
) -> Iterator[tuple[int, list[Row]]]:
    """Answer as the fake does, with a digit of the seed if the answers are sampled."""

    def generate(requests: list[list[int]], seeds: list[int]) -> list[list[int]]:
        answers = [echo_answer(request) for request in requests]
        if settings.temperature:
            answers = [
                [*answer[:-1], ord(str(seed % 10)), answer[-1]]
                for answer, seed in zip(answers, seeds, strict=True)
            ]
        return answers

    report(0, 0)
    for index, prompts in shards:
        rows = answer_prompts(prompts, model, generate, settings.seed)
        report(sum(row.num_answers for row in rows), sum(row.num_answer_tokens for row in rows))
        yield index, rows


def fork(function: Callable[[], object]) -> int:
    """Run a function in a child process that ends with it, whatever happens; return its id."""
    process = os.fork()
    if process:
        return process
    try:
        os.close(2)
        function()
    finally:  # an exception would otherwise carry on with the tests in both processes
        os._exit(1)
