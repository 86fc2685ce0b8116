"""The walk of grammars over trees, against a grammar that takes each node's path from the root."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_medusa.plugin.core.structured_output import fill_tree, stop_at_the_end

NUM_TOKENS = 40
EOS = 35
#: Few, so that drafts are often permitted; in two words of a mask.
WORDS = [0, 1, 33, EOS]
NUM_STATES = 4
FREE = -torch.ones(2, dtype=torch.int32)


@dataclass
class FakeGrammar:
    """A finite automaton with the manners of one of vLLM's grammars.

    Attributes:
        moves: by state, the tokens it permits and the states they lead to; `EOS` leads to the end.
        has_lag: like ``GuidanceGrammar``: where `EOS` alone is permitted it is not taken, so that
            rolling back must not count it, and tokens behind it are refused.
        history: states so far.

    """

    moves: dict[int, dict[int, int]]
    has_lag: bool
    history: list[int] = field(default_factory=lambda: [0])
    lag: int = 0
    is_ended: bool = False

    def is_terminated(self) -> bool:
        return self.is_ended

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        assert request_id == "request"
        for token in tokens:
            assert not self.is_ended, "fed behind its end"
            moves = self.moves[self.history[-1]]
            if token not in moves:
                return False
            self.is_ended = token == EOS
            if self.is_ended and self.has_lag and len(moves) == 1:
                self.lag = 1
            else:
                self.history.append(moves[token])
        return True

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens > 0
        num_states = num_tokens - self.lag
        assert num_states < len(self.history)
        if num_states:
            del self.history[-num_states:]
        self.lag = 0
        self.is_ended = False

    def fill_bitmask(self, bitmask: torch.Tensor, index: int) -> None:
        assert not self.is_ended
        bitmask[index] = mask_of(self.moves[self.history[-1]])


def mask_of(tokens: Any) -> torch.Tensor:
    """[2] int32, a bit for each token."""
    bits = torch.zeros(64, dtype=torch.int64)
    bits[list(tokens)] = 1
    words = (bits.view(2, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def expected_mask(grammar: FakeGrammar, tokens: list[int]) -> torch.Tensor:
    """The mask behind a path from the root, of a grammar that takes it one token a step."""
    own = FakeGrammar(
        grammar.moves, grammar.has_lag, list(grammar.history), is_ended=grammar.is_ended
    )
    for token in tokens:
        if own.is_ended or token not in own.moves[own.history[-1]]:
            break
        assert own.accept_tokens("request", [token])
    return FREE if own.is_ended else mask_of(own.moves[own.history[-1]])


@st.composite
def grammars(draw: st.DrawFn) -> FakeGrammar:
    states = st.integers(0, NUM_STATES - 1)
    moves = st.dictionaries(st.sampled_from(WORDS), states, min_size=1)
    return FakeGrammar({s: draw(moves) for s in range(NUM_STATES)}, draw(st.booleans()))


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Parents, in any order that puts them before their children, and tokens."""
    parents = [draw(st.integers(0, node)) for node in range(draw(st.integers(0, 12)))]
    tokens = st.sampled_from([*WORDS, -1, 20])
    return parents, draw(st.lists(tokens, max_size=len(parents)))


@given(grammars(), st.lists(st.sampled_from(WORDS), max_size=3), trees())
def test_each_node_has_the_mask_of_its_path(
    grammar: FakeGrammar, context: list[int], tree: tuple[list[int], list[int]]
) -> None:
    stop_at_the_end(grammar)
    grammar.accept_tokens("request", context)
    before = (list(grammar.history), grammar.is_ended, grammar.lag)
    parents, tokens = tree
    bitmask = torch.full((1 + len(parents), 2), 7, dtype=torch.int32)
    fill_tree(bitmask, grammar, "request", tokens, parents)
    assert (grammar.history, grammar.is_ended, grammar.lag) == before
    for node in range(1 + len(tokens)):
        path, at = [], node
        while at:
            path.append(tokens[at - 1])
            at = parents[at - 1]
        assert torch.equal(bitmask[node], expected_mask(grammar, path[::-1])), node
    # Rows of nodes that are not run are somebody else's.
    assert (bitmask[1 + len(tokens) :] == 7).all()


@given(grammars(), st.lists(st.sampled_from(WORDS), max_size=6))
def test_a_path_is_taken_as_one_token_a_step(grammar: FakeGrammar, tokens: list[int]) -> None:
    """All at once, and up to the end only: behind it everything is right."""
    single = FakeGrammar(grammar.moves, grammar.has_lag)
    is_right = True
    for token in tokens:
        is_right = is_right and (single.is_ended or single.accept_tokens("request", [token]))
    stop_at_the_end(grammar)
    assert grammar.accept_tokens("request", tokens) == is_right
    assert (grammar.history, grammar.is_ended) == (single.history, single.is_ended)
