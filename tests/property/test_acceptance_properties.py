"""Path statistics against slow, obvious forms of the same, over random ranks."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_medusa.acceptance.statistics import RANK_CAP, position_average, step_counts
from vllm_medusa.acceptance.texts import LOOP_TOKENS, loop_start
from vllm_medusa.acceptance.trees import (
    best_paths,
    path_probabilities,
    product_paths,
    rank_probabilities,
    step_paths,
)
from vllm_medusa.tree.draft_tree import DraftTree, TreePath

Continuations = list[np.ndarray]

_MISSES = (RANK_CAP - 1, RANK_CAP, RANK_CAP + 5)


@st.composite
def continuations(draw: st.DrawFn, max_rank: int = 3, max_positions: int = 12) -> Continuations:
    num_heads = draw(st.integers(1, 4))
    # Low ranks more often, so that paths repeat; now and then a miss, or the last rank that counts.
    rank = st.integers(0, max_rank) | st.just(0) | st.sampled_from(_MISSES)
    row = st.lists(rank, min_size=num_heads, max_size=num_heads)
    texts = draw(st.lists(st.lists(row, max_size=max_positions), min_size=1, max_size=5))
    return [np.array(rows, dtype=np.int16).reshape(-1, num_heads) for rows in texts]


def num_positions(texts: Continuations) -> int:
    return sum(map(len, texts))


def slow_accepted(row: list[int], tree: set[TreePath]) -> int:
    accepted = 0
    while accepted < len(row) and tuple(row[: accepted + 1]) in tree:
        accepted += 1
    return accepted


def slow_counts(texts: Continuations, paths: list[TreePath]) -> list[list[int]]:
    counts = []
    for ranks in texts:
        position = steps = 0
        while position < len(ranks):
            position += 1 + slow_accepted(ranks[position].tolist(), set(paths))
            steps += 1
        counts.append([position, steps])
    return counts


def slow_average(texts: Continuations, paths: list[TreePath]) -> float:
    rows = [row for ranks in texts for row in ranks.tolist()]
    return 1 + sum(slow_accepted(row, set(paths)) for row in rows) / len(rows)


def all_trees(paths: list[TreePath], size: int) -> list[tuple[TreePath, ...]]:
    return [
        chosen
        for chosen in itertools.combinations(paths, size)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    ]


@given(continuations(), st.data())
def test_simulation_is_the_slow_walk(texts: Continuations, data: st.DataObject) -> None:
    pool = best_paths(texts, 100)
    paths = pool[: data.draw(st.integers(0, len(pool)))]
    assert step_counts(texts, paths).tolist() == slow_counts(texts, paths)
    if num_positions(texts):
        assert np.isclose(position_average(texts, paths), slow_average(texts, paths))


@given(continuations())
def test_every_prefix_is_a_tree(texts: Continuations) -> None:
    for find in (best_paths, step_paths, product_paths):
        paths = find(texts, 40)
        for size in range(1, len(paths) + 1):
            assert DraftTree.from_paths(paths[:size]).num_draft_tokens == size


@settings(max_examples=60)
@given(continuations(max_rank=1, max_positions=5))
def test_best_paths_are_the_best_tree(texts: Continuations) -> None:
    pool = sorted(path_probabilities(texts))[:10]
    inside = [path for path in pool if all(path[:d] in pool for d in range(1, len(path)))]
    best = [path for path in best_paths(texts, 1000) if path in inside]
    for size in range(1, min(4, len(best)) + 1):
        most = max(position_average(texts, list(tree)) for tree in all_trees(inside, size))
        assert np.isclose(position_average(texts, best[:size]), most)


@given(continuations(), st.integers(1, 30))
def test_joint_is_never_below_product(texts: Continuations, size: int) -> None:
    joint, product = best_paths(texts, size), product_paths(texts, size)
    assert position_average(texts, joint) >= position_average(texts, product) - 1e-12


@given(continuations())
def test_position_average_is_the_sum_of_probabilities(texts: Continuations) -> None:
    probabilities = path_probabilities(texts)
    paths = best_paths(texts, len(probabilities))
    assert sorted(paths) == sorted(probabilities)
    total = 1 + sum(probabilities[path] for path in paths)
    assert np.isclose(position_average(texts, paths), total)


@given(continuations())
def test_product_paths_are_the_most_probable_products(texts: Continuations) -> None:
    by_rank = rank_probabilities(texts)
    used = [np.flatnonzero(row).tolist() for row in by_rank]
    products = sorted(
        (
            float(np.prod([by_rank[d, rank] for d, rank in enumerate(path)]))
            for depth in range(1, len(used) + 1)
            for path in itertools.product(*used[:depth])
        ),
        reverse=True,
    )[:40]
    found = [
        float(np.prod([by_rank[d, rank] for d, rank in enumerate(path)]))
        for path in product_paths(texts, 40)
    ]
    assert np.allclose(found, products)


def slow_visits(texts: Continuations, paths: list[TreePath]) -> list[list[float]]:
    """Walk from each of the first positions."""
    longest = texts[0].shape[1] + 1
    result = []
    for ranks in texts:
        visits = [0.0] * len(ranks)
        for start in range(longest):
            position = start
            while position < len(ranks):
                visits[position] += 1 / longest
                position += 1 + slow_accepted(ranks[position].tolist(), set(paths))
        result.append(visits)
    return result


def slow_smoothed(visits: list[float], longest: int) -> list[float]:
    starts = [p - longest // 2 for p in range(len(visits))]
    windows = [visits[max(0, start) : start + longest] for start in starts]
    return [sum(window) / len(window) for window in windows]


@settings(max_examples=60)
@given(continuations(), st.integers(1, 8))
def test_step_paths_grow_where_steps_begin(texts: Continuations, size: int) -> None:
    ever_right = set(path_probabilities(texts))
    grown = step_paths(texts, size)
    assert len(grown) == min(size, len(ever_right))
    chosen: list[TreePath] = []
    for path in grown:
        visits = slow_visits(texts, chosen)
        counts: dict[TreePath, float] = {}
        for ranks, text_visits in zip(texts, visits, strict=True):
            weights = slow_smoothed(text_visits, ranks.shape[1] + 1)
            for row, weight in zip(ranks.tolist(), weights, strict=True):
                for depth in range(1, slow_accepted(row, ever_right) + 1):
                    key = tuple(row[:depth])
                    counts[key] = counts.get(key, 0.0) + weight
        fitting = [p for p in counts if p not in chosen and (len(p) == 1 or p[:-1] in chosen)]
        most = max(counts[p] for p in fitting)
        if not np.isclose(counts[path], most):
            saved = {
                p: sum(map(sum, visits)) - sum(map(sum, slow_visits(texts, [*chosen, p])))
                for p in fitting
            }
            first = [p for p in fitting if np.isclose(counts[p], most)]
            assert any(
                saved[path] - saved[p] > np.sqrt(abs(saved[path]) + abs(saved[p])) - 1e-9
                for p in first
            )
        chosen.append(path)


@given(st.lists(st.integers(0, 2), max_size=60))
def test_loop_start_is_the_first_repeated_run(tokens: list[int]) -> None:
    width = LOOP_TOKENS
    runs = [tuple(tokens[i : i + width]) for i in range(len(tokens) - width + 1)]
    repeats = [i for i, run in enumerate(runs) if run in runs[:i]]
    assert loop_start(tokens) == (repeats[0] if repeats else len(tokens))
