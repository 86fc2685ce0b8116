"""Properties of prompt files, rows and interrupted runs, for whatever hypothesis comes up with."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data_fakes import (
    DEMO_TEXTS,
    EchoTokenizer,
    answer_without_engine,
    echo_answer,
    fork,
    make_model,
)
from vllm_medusa.data.prompts import Prompt, Turn, parse_prompts
from vllm_medusa.data.rows import Row, read_rows, write_shard
from vllm_medusa.distill import run as module
from vllm_medusa.distill.run import DistillSettings, distill
from vllm_medusa.target.conversations import answer_prompts, first_request
from vllm_medusa.target.settings import AnswerSettings

contents = st.text("ab :", min_size=1, max_size=6)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), contents), max_size=6)
conversations = st.builds(
    lambda system, first, rest: [*system, ("user", first), *rest],
    st.lists(st.tuples(st.just("system"), contents), max_size=1),
    contents,
    turns,
)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """Any row that a data set may hold."""
    length = draw(st.integers(1, 20))
    tokens = st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)
    mask = st.lists(st.booleans(), min_size=length, max_size=length)
    identity = draw(st.text(st.characters(codec="utf-8")))
    return Row(identity, np.array(draw(tokens), np.int32), np.array(draw(mask), np.bool_))


@given(st.lists(rows(), max_size=8), st.sampled_from(["parquet", "jsonl"]))
def test_rows_come_back_as_they_were(some: list[Row], suffix: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, f"part-00000.{suffix}")
        write_shard(path, some)
        assert [row.as_record() for row in read_rows(path)] == [row.as_record() for row in some]


@given(rows())
def test_answers_of_a_row_are_its_runs(row: Row) -> None:
    runs = "".join("x" if answered else " " for answered in row.loss_mask).split()
    assert row.num_answers == len(runs)
    assert row.num_answer_tokens == len("".join(runs))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(
    st.sampled_from(["id", "prompt", "text", "messages", "conversations", "turns"]),
    json_values | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), json_values)),
    max_size=2,
)
lines = st.binary().filter(lambda line: b"\n" not in line) | objects.map(
    lambda value: json.dumps(value).encode()
)


@given(st.lists(lines, max_size=6))
def test_every_line_is_a_prompt_or_bad(some: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "prompts.jsonl")
        path.write_bytes(b"".join(line + b"\n" for line in some))
        prompts, bad = parse_prompts(path)
    numbers = [prompt.line for prompt in prompts] + [line.line for line in bad]
    assert sorted(numbers) == list(range(1, len(some) + 1))
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert bool(prompt.text) != any(turn.role == "user" for turn in prompt.turns)
        assert Prompt.from_record(json.loads(json.dumps(prompt.as_record()))) == prompt
    assert not any("\n" in line.reason for line in bad)


def answers_as_served(prompt: Prompt, model: Any) -> list[tuple[list[int], list[int]]]:
    """Oracle: each answer and all that a server was sent before it, one request after the other."""
    messages: list[Turn] = []
    served = []
    for turn in prompt.turns:
        if turn.role != "assistant":
            messages.append(turn)
        if turn.role == "user":
            request = model.tokens_of_chat(messages)
            if len(request) > model.max_prompt_tokens:
                break
            served.append((request, echo_answer(request)))
            messages.append(Turn("assistant", model.text_of(served[-1][1])))
    return served


@given(st.lists(conversations, min_size=1, max_size=4), st.booleans(), st.integers(20, 60))
def test_rows_hold_each_answer_once_after_what_a_server_was_sent(
    some: list[list[tuple[Any, str]]], forget_answers: bool, limit: int
) -> None:
    prompts = [
        Prompt(str(index), index, turns=tuple(Turn(*turn) for turn in conversation))
        for index, conversation in enumerate(some)
    ]
    model = make_model(max_prompt_tokens=limit, forget_answers=forget_answers)
    prompts = [prompt for prompt in prompts if len(first_request(prompt, model)) <= limit]
    answered = answer_prompts(
        prompts, model, lambda requests, seeds: [*map(echo_answer, requests)], seed=0
    )
    found: dict[str, list[tuple[list[int], list[int]]]] = {prompt.id: [] for prompt in prompts}
    for row in answered:
        tokens = row.token_ids.tolist()
        starts = np.flatnonzero(np.diff(row.loss_mask.astype(int), prepend=0) == 1)
        ends = np.flatnonzero(np.diff(row.loss_mask.astype(int), append=0) == -1) + 1
        for start, end in zip(starts, ends, strict=True):
            found[row.id.partition("#")[0]].append((tokens[:start], tokens[start:end]))
    assert found == {prompt.id: answers_as_served(prompt, model) for prompt in prompts}
    if not forget_answers:
        assert [row.id for row in answered] == [prompt.id for prompt in prompts]


def run(directory: Path) -> None:
    settings = DistillSettings(
        answers=AnswerSettings(model="fake", temperature=1.0),
        prompts=directory / "prompts.jsonl",
        out=directory / "out",
        shard_size=4,
        shard_format="jsonl",
    )
    with (
        patch.object(module, "answer_locally", answer_without_engine),
        patch.object(module, "load_answering_model", lambda settings: make_model()),
    ):
        distill(settings)


def run_killed(directory: Path, num_calls: int, before: bool) -> None:
    """Run in this process, killed before or after its n-th call that touches the disk."""
    calls = 0

    def deadly(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == num_calls and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if calls == num_calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    with (
        patch.object(os, "fsync", deadly(os.fsync)),
        patch.object(Path, "replace", deadly(Path.replace)),
        patch.object(Path, "mkdir", deadly(Path.mkdir)),
    ):
        run(directory)


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("out/part-*")}


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=10))
def test_killed_anywhere_any_number_of_times_the_rows_are_the_same(
    kills: list[tuple[int, bool]],
) -> None:
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        for directory in (first, second):
            lines = [json.dumps({"prompt": text}) + "\n" for text in DEMO_TEXTS]
            Path(directory, "prompts.jsonl").write_text("".join(lines))
        run(Path(first))
        for num_calls, before in kills:
            os.waitpid(fork(lambda n=num_calls, b=before: run_killed(Path(second), n, b)), 0)
        run(Path(second))
        assert len(shards(Path(first))) == 3
        assert shards(Path(first)) == shards(Path(second))
        assert sorted(path.name for path in Path(second, "out").iterdir()) == sorted(
            ["distill.json", *shards(Path(first))]
        )


def test_the_fake_tokenizer_forgets_only_if_told() -> None:
    """Else the conversations above would not try both kinds of template."""
    prompt = Prompt("a", 1, turns=(Turn("user", "x"), Turn("user", "y")))
    texts = [
        EchoTokenizer().decode(answers_as_served(prompt, make_model(forget_answers=told))[1][0])
        for told in (False, True)
    ]
    assert texts == ["U:x\nA:x\nU:y\nA:", "U:x\nU:y\nA:"]
