"""Steps predicted from ranks are those of an engine that is written out plainly."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_medusa.acceptance.ranks import wanted_tokens
from vllm_medusa.acceptance.statistics import RANK_CAP, Ranks, step_counts
from vllm_medusa.acceptance.texts import Counted, counted_positions, loop_start
from vllm_medusa.calibration.check import steps_of
from vllm_medusa.engines.engine import RequestTimes
from vllm_medusa.tree.draft_tree import TreePath

END = 3
VOCABULARY = range(END + 1)


@dataclass
class Case:
    """An answer, what the target would write on and on, and what the heads guess.

    Attributes:
        future: tokens of the target, the answer's first.
        num_tokens: of the answer.
        has_ended: whether its last token is `END`.
        guesses: at each position, of each head all tokens by rank.
        paths: of the tree.
    """

    future: list[int]
    num_tokens: int
    has_ended: bool
    guesses: list[list[list[int]]]
    paths: list[TreePath]

    @property
    def answer(self) -> list[int]:
        return self.future[: self.num_tokens]

    @property
    def num_heads(self) -> int:
        return len(self.guesses[0])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_heads = draw(st.integers(1, 3))
    # Of few tokens, one of which often comes again: some answers loop.
    unit = draw(st.lists(st.integers(0, END - 1), min_size=1, max_size=40))
    num_tokens = draw(st.integers(1, 60))
    future = (unit * 70)[: num_tokens + num_heads + 1]
    has_ended = draw(st.booleans())
    if has_ended:
        future[num_tokens - 1] = END
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    guesses = [
        [_guess(rng, future[min(p + 1 + k, len(future) - 1)]) for k in range(num_heads)]
        for p in range(len(future))
    ]
    paths: list[TreePath] = []
    for _ in range(draw(st.integers(0, 8))):
        parents = [path for path in [(), *paths] if len(path) < num_heads]
        path = (*draw(st.sampled_from(parents)), draw(st.integers(0, 2)))
        paths += [] if path in paths else [path]
    return Case(future, num_tokens, has_ended, guesses, paths)


def _guess(rng: np.random.Generator, right: int) -> list[int]:
    """All tokens by rank, the right one often among the first."""
    scores = rng.random(len(VOCABULARY))
    scores[right] += rng.random()
    return [int(token) for token in np.argsort(-scores)]


def engine(case: Case, limit: int) -> list[int]:
    """How many tokens each step emits: the prompt's own, then one step after the other."""
    output, emitted = [case.future[0]], [1]
    while output[-1] != END and len(output) < limit:
        root = len(output) - 1
        path: TreePath = ()
        step: list[int] = []
        while True:
            token = case.future[root + 1 + len(path)]
            step.append(token)
            right = [
                child
                for child in case.paths
                if child[:-1] == path and case.guesses[root][len(path)][child[-1]] == token
            ]
            if token == END or len(output) + len(step) == limit or not right:
                break
            path = right[0]
        output += step
        emitted.append(len(step))
    assert output == case.future[: len(output)]
    return emitted


def ranks_of(case: Case, counted: Counted) -> Ranks:
    wanted = wanted_tokens(case.answer, counted.total, case.num_heads).tolist()
    rows = [
        [
            RANK_CAP if token < 0 else case.guesses[position][head].index(token)
            for head, token in enumerate(row)
        ]
        for position, row in enumerate(wanted)
    ]
    return np.array(rows, dtype=np.int16).reshape(-1, case.num_heads)


@given(cases())
def test_predicted_steps_are_the_engines(case: Case) -> None:
    emitted = engine(case, case.num_tokens)
    times = RequestTimes(0.0, None, emitted, case.has_ended)
    run: Any = SimpleNamespace(token_ids=[case.answer], requests=[times])
    counted = counted_positions(case.answer, case.has_ended, case.num_heads)
    assert counted.before_loop <= counted.total
    ranks = ranks_of(case, counted)
    ((every, before_loop),) = steps_of(run, case.num_heads)
    assert step_counts([ranks], case.paths).tolist() == [every]
    assert step_counts([ranks[: counted.before_loop]], case.paths).tolist() == [before_loop]
    if case.has_ended:
        assert every == [case.num_tokens - 1, len(emitted) - 1]


@given(cases())
def test_no_step_that_counts_is_shortened_by_the_limit_or_reaches_the_loop(case: Case) -> None:
    counted = counted_positions(case.answer, case.has_ended, case.num_heads)
    cut, uncut = engine(case, case.num_tokens), engine(case, len(case.future))
    roots = np.cumsum(cut)[:-1] - 1
    num_steps = 1 + int((roots < counted.total).sum())
    assert cut[:num_steps] == uncut[:num_steps]
    ends = roots + cut[1:]
    loop = loop_start(case.answer)
    assert loop == len(case.answer) or all(ends[roots < counted.before_loop] < loop)
