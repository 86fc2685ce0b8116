"""The look-up in texts against naive searches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import draft_oracle as oracle
from vllm_medusa.draft.compiled import along_paths
from vllm_medusa.draft.continuations import MAX_PLACES
from vllm_medusa.draft.learning import LogisticCurve
from vllm_medusa.draft.proposer import outcomes
from vllm_medusa.draft.sources.shared_text import SharedTextSource
from vllm_medusa.draft.sources.text import TextSource
from vllm_medusa.draft.text_index import (
    AHEAD,
    BEHIND,
    NO_TOKEN,
    ORDERS,
    TextIndex,
    keys_of,
    match_lengths,
)
from vllm_medusa.draft.trie import build_trie
from vllm_medusa.draft.types import Candidates, Request, Source

# Two or three tokens, so that long matches are common.
texts = st.lists(st.integers(0, 2), max_size=60) | st.lists(st.integers(0, 1), max_size=60)
chunks = st.lists(texts, min_size=1, max_size=5)


def index_of(tokens: list[int], max_tokens: int = 10**6) -> TextIndex:
    index = TextIndex(max_tokens)
    index.extend(tokens)
    return index


def naive_match(tokens: list[int], place: int, ending: list[int]) -> int:
    """How many tokens before a place equal the last ones of an ending."""
    length = 0
    while (
        length < min(place, len(ending), BEHIND)
        and tokens[place - 1 - length] == ending[-1 - length]
    ):
        length += 1
    return length


def naive_places(tokens: list[int], ending: list[int], count: int) -> list[int]:
    """For each length of n-gram, the longest first: its latest places, as many as are wanted."""
    found: list[int] = []
    for order in reversed(ORDERS):
        places = [
            place
            for place in range(len(tokens) - 1, 0, -1)
            if naive_match(tokens, place, ending) >= order
        ]
        found += [place for place in places[:count] if place not in found]
    return found[:count]


@given(texts, st.integers(1, 9))
def test_places_are_those_of_a_naive_search(tokens: list[int], count: int) -> None:
    index = index_of(tokens)
    assert index.places(index.keys, count) == naive_places(tokens, tokens, count)


@given(texts, texts, st.integers(1, 9))
def test_places_of_another_text(tokens: list[int], other: list[int], count: int) -> None:
    assert index_of(tokens).places(keys_of(other), count) == naive_places(tokens, other, count)


@given(chunks)
def test_grown_index_equals_one_made_at_once(parts: list[list[int]]) -> None:
    grown = TextIndex(10**6)
    for part in parts:
        grown.extend(part)
    whole = index_of([token for part in parts for token in part])
    assert grown.keys == whole.keys
    assert grown.places(grown.keys, 99) == whole.places(whole.keys, 99)
    np.testing.assert_array_equal(grown.tokens(), whole.tokens())
    np.testing.assert_array_equal(grown.ending(), whole.ending())


@given(chunks, st.integers(2, 40))
def test_index_is_bounded(parts: list[list[int]], max_tokens: int) -> None:
    """A text that grew too long is as if it began later; half of the bound is always there."""
    index = TextIndex(max_tokens)
    for part in parts:
        index.extend(part)
        assert len(index) <= max_tokens
    tokens = [token for part in parts for token in part]
    assert index.num_added == len(tokens)
    assert len(index) >= min(len(tokens), max_tokens // 2)
    kept = tokens[len(tokens) - len(index) :]
    assert index.tokens().tolist() == kept
    assert index.places(index.keys, 9) == index_of(kept).places(index_of(kept).keys, 9)


@given(texts.filter(bool))
def test_windows_and_matches(tokens: list[int]) -> None:
    index = index_of(tokens)
    padded = [NO_TOKEN] * BEHIND + tokens + [NO_TOKEN] * AHEAD
    assert index.ending().tolist() == padded[len(tokens) : len(tokens) + BEHIND]
    places = list(range(len(tokens)))
    windows = index.windows(places)
    assert windows.tolist() == [padded[place : place + BEHIND + AHEAD] for place in places]
    lengths = match_lengths(windows, np.tile(index.ending(), (len(places), 1)))
    assert lengths.tolist() == [naive_match(tokens, place, tokens) for place in places]


rows = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=4), st.integers(1, 9)),
    min_size=1,
    max_size=12,
)


@given(rows)
def test_trie(given_rows: list[tuple[int, list[int], int]]) -> None:
    given_rows = sorted(given_rows, key=lambda row: row[0])
    request = np.array([row[0] for row in given_rows])
    match = np.array([row[2] for row in given_rows])
    weight = 1.5**match
    table = np.full((len(given_rows), 4), NO_TOKEN, dtype=np.int32)
    for line, (_, tokens, _) in zip(table, given_rows, strict=True):
        line[: len(tokens)] = tokens
        line[len(tokens) + 1 :] = 7  # what is behind the end does not count
    trie = build_trie(request, table, weight, match, num_requests=5)

    paths: list[tuple[int, ...]] = []
    for place, parent in enumerate(trie.parents.tolist()):
        paths.append((*(paths[parent] if parent >= 0 else ()), int(trie.tokens[place])))
    names = list(zip(trie.request.tolist(), paths, strict=True))
    expected = {
        (b, tuple(tokens[:depth]))
        for b, tokens, _ in given_rows
        for depth in range(1, len(tokens) + 1)
    }
    assert len(set(names)) == len(names)
    assert set(names) == expected
    assert trie.depths.tolist() == sorted(len(path) for path in paths)
    for place, (b, path) in enumerate(names):

        def through(beginning: tuple[int, ...], b: int = b) -> list[int]:
            return [
                line
                for line, (owner, tokens, _) in enumerate(given_rows)
                if owner == b and tuple(tokens[: len(beginning)]) == beginning
            ]

        lines, above = through(path), through(path[:-1])
        assert trie.count[place] == len(lines)
        assert trie.weight[place] == pytest.approx(weight[lines].sum())
        assert trie.total[place] == pytest.approx(weight[above].sum())
        assert trie.match[place] == match[lines].max()
        assert trie.is_best[place] == (lines[0] == above[0])
    chance = np.linspace(0.2, 0.9, len(names))
    by_name = dict(zip(names, chance.tolist(), strict=True))
    for (b, path), product in zip(names, along_paths(trie.parents, chance).tolist(), strict=True):
        factors = [by_name[b, path[:depth]] for depth in range(1, len(path) + 1)]
        assert product == pytest.approx(np.prod(factors))


def tree_of(candidates: Candidates, request: int) -> dict[oracle.Path, float]:
    """Path -> probability given the parent, of one request's candidates."""
    paths: list[oracle.Path] = []
    for place, parent in enumerate(candidates.parents.tolist()):
        paths.append((*(paths[parent] if parent >= 0 else ()), int(candidates.tokens[place])))
        assert len(paths[-1]) == candidates.depths[place]
    mine = np.flatnonzero(candidates.request == request).tolist()
    return {paths[place]: float(candidates.probability[place]) for place in mine}


def naive_tree(
    tokens: list[int], ending: list[int], depth: int, stop: int | None = None
) -> set[oracle.Path]:
    """Paths of the continuations of a text's best places; each ends at a token ``stop``."""
    paths = set()
    for place in naive_places(tokens, ending, MAX_PLACES):
        ahead = tokens[place : place + depth]
        if stop in ahead:
            ahead = ahead[: ahead.index(stop)]
        paths |= {tuple(ahead[:length]) for length in range(1, len(ahead) + 1)}
    return paths


def even_curve() -> LogisticCurve:
    """All nodes alike, and so likely that none is left out."""
    return LogisticCurve(np.zeros(5), np.array([3.0]))


def request_of(key: str, tokens: list[int], num_prompt_tokens: int = 0) -> Request:
    return Request(key, np.array(tokens, dtype=np.int64), num_prompt_tokens)


@given(st.lists(texts.filter(bool), min_size=1, max_size=3), st.integers(1, 6), st.data())
def test_text_source_proposes_what_followed(
    many: list[list[int]], depth: int, data: st.DataObject
) -> None:
    source = TextSource(even_curve(), None, max_depth=depth, max_tokens=10**6)
    # Whatever part of the texts it has seen before.
    seen = [text[: data.draw(st.integers(1, len(text)))] for text in many]
    source.propose([request_of(str(b), text) for b, text in enumerate(seen)])
    candidates = source.propose([request_of(str(b), text) for b, text in enumerate(many)])
    for b, text in enumerate(many):
        assert set(tree_of(candidates, b)) == naive_tree(text, text, depth)


@given(st.lists(texts, min_size=1, max_size=4), texts.filter(bool), st.integers(1, 6))
def test_shared_text_source_proposes_what_followed_in_finished_outputs(
    outputs: list[list[int]], text: list[int], depth: int
) -> None:
    source = SharedTextSource(even_curve(), None, max_depth=depth, max_tokens=10**6)
    corpus: list[int] = []
    for place, output in enumerate(outputs):
        # The prompt of two tokens is not shared.
        source.propose([request_of(str(place), [1, 2, *output], 2)])
        source.finish(str(place))
        corpus += [*output, NO_TOKEN]
    candidates = source.propose([request_of("new", text)])
    assert set(tree_of(candidates, 0)) == naive_tree(corpus, text, depth, stop=NO_TOKEN)


@given(oracle.trees(Source.TEXT, 12, 5), st.lists(st.integers(0, 5), max_size=6))
def test_outcomes(tree: oracle.Tree, following: list[int]) -> None:
    candidates = oracle.as_candidates([{}, tree])
    tokens = np.array([[0] * 7, following + [9] * (7 - len(following))])
    observed, right = outcomes(
        *(candidates.request, candidates.parents, candidates.tokens),
        *(tokens, np.array([0, len(following)])),
    )
    paths = sorted(tree, key=lambda path: (len(path), list(tree).index(path)))
    for place, path in enumerate(paths):
        above_is_right = list(path[:-1]) == following[: len(path) - 1]
        assert observed[place] == (above_is_right and len(path) <= len(following))
        assert right[place] == (list(path) == following[: len(path)])
