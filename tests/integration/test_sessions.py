"""Streaming-input sessions: the text of each turn is that without speculation.

A turn ends at a stop token or at its length, which lies within an accepted path; the session goes
on from there with further input.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from vllm import SamplingParams

from tests import tiny
from tests.integration.conftest import counters, draft_with, open_engine

pytestmark = pytest.mark.engine

Stops = Callable[[int, int], list[int] | None]

NUM_SESSIONS = 6
#: Tokens that each turn brings; with one, the next step begins where the accepted path had ended.
INPUTS = [[40, 1, 33, 2], [7, 1, 1, 1], [64, 3, 1, 50], [20, 1, 2, 1], [31, 1, 70, 1], [5, 2, 1, 9]]
#: Where each turn stops; none ends with a step, whose deepest path is 4.
LENGTHS = [6, 3, 9, 13]


def params(
    session: int, turn: int, stop: list[int] | None = None, extra: int = 0
) -> SamplingParams:
    sampled = {"temperature": 0.8, "seed": session} if session % 2 else {"temperature": 0}
    return SamplingParams(
        **sampled,
        # Stopped by a token, a turn could be longer.
        max_tokens=LENGTHS[turn] + (8 if stop else extra),
        stop_token_ids=stop,
        ignore_eos=True,
        detokenize=False,
        presence_penalty=0.5 if session == 2 else 0.0,
    )


def add(llm: Any, name: str, tokens: list[int], sampling: SamplingParams, resumable: bool) -> None:
    engine = llm.llm_engine
    request = engine.input_processor.process_inputs(
        name, {"prompt_token_ids": tokens}, sampling, ("generate",), resumable=resumable
    )
    engine.engine_core.add_request(request)


def converse(
    llm: Any, stops: Stops, num_turns: int = len(LENGTHS), extra: int = 0
) -> list[list[list[int]]]:
    """Run all sessions turn by turn; return the tokens of each session's turns.

    Args:
        llm: an engine of this process.
        stops: gives the stop tokens of a session's turn.
        num_turns: how many turns.
        extra: let the last turn run on by so many tokens, without stop tokens.

    """
    rng = random.Random(2)
    texts: list[list[list[int]]] = [[] for _ in range(NUM_SESSIONS)]
    core = llm.llm_engine.engine_core
    for turn in range(num_turns):
        is_longer = extra > 0 and turn == num_turns - 1
        waiting = {}
        for session in range(NUM_SESSIONS):
            tokens = [rng.randrange(tiny.VOCAB_SIZE - 1) for _ in range(INPUTS[session][turn])]
            texts[session].append([])
            name = f"session-{session}"
            waiting[name] = texts[session][-1]
            stop = None if is_longer else stops(session, turn)
            sampling = params(session, turn, stop, extra if is_longer else 0)
            add(llm, name, tokens, sampling, True)
        while waiting:
            for output in core.get_output().outputs:
                waiting[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    del waiting[output.request_id]
    for session in range(NUM_SESSIONS):
        add(llm, f"session-{session}", [0], params(session, 0), False)
    while core.engine_core.scheduler.has_requests():
        core.get_output()
    return texts


class SessionOracle(tiny.Oracle):
    """Knows how each turn goes on, behind its stop too."""

    def __init__(self, turns: list[list[int]]) -> None:
        super().__init__({}, seed=1)
        self.turns = turns

    def future_of(self, prompt: tuple[int, ...], output: list[int]) -> list[int]:
        for turn in self.turns:
            if output and turn[: len(output)] == output:
                return turn[len(output) :]
        return []


def by_length(session: int, turn: int) -> None:
    """Turns end by their length."""


@pytest.fixture(scope="module")
def reference(tiny_model: Any) -> dict[str, tuple[Stops, list[list[list[int]]], list[list[int]]]]:
    """By what ends turns: their stop tokens, the turns without speculation, what follows them."""
    found: dict[str, Any] = {}
    with open_engine(tiny_model) as llm:
        texts = converse(llm, by_length)

        def by_token(session: int, turn: int) -> list[int]:
            return [texts[session][turn][-1]]

        for name, stops in {"length": by_length, "token": by_token}.items():
            longer = []
            for num_turns in range(1, 1 + len(LENGTHS)):
                longer += [turns[-1] for turns in converse(llm, stops, num_turns, extra=12)]
            found[name] = (stops, converse(llm, stops), longer)
    return found


@pytest.mark.parametrize("tree", ["chain", "cpu-32"])
@pytest.mark.parametrize("ends", ["length", "token"])
def test_turns(
    tiny_model: Any, tiny_heads: Any, reference: dict[str, Any], tree: str, ends: str
) -> None:
    stops, texts, longer = reference[ends]
    assert any(turn[: len(text)] == text for turn in longer for text in texts[1])
    spec = {"method": "medusa", "model": str(tiny_heads), "tree": tree}
    with open_engine(tiny_model, speculative_config=spec) as llm:
        oracle = SessionOracle(longer)
        draft_with(llm, lambda runner: tiny.OracleDrafter(oracle, runner))
        assert converse(llm, stops) == texts
        if tree != "chain":
            assert counters(llm)["forks_accepted"] > 10
