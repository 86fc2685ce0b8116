"""Merging and choosing draft nodes against slow, obvious forms of the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import draft_oracle as oracle
from vllm_medusa.draft.agreement import Agreement
from vllm_medusa.draft.budget import UNLIMITED, Ranked, best_rate, best_size, rank, take
from vllm_medusa.draft.costs import CostCurve
from vllm_medusa.draft.learning import LogisticCurve, Recorder
from vllm_medusa.draft.merge import Nodes, join, merge
from vllm_medusa.draft.probability import AGREEMENT, Probabilities
from vllm_medusa.draft.sources.heads import HeadsSource
from vllm_medusa.draft.superset import Superset
from vllm_medusa.draft.types import Drafts, Emitted

CURVE = Probabilities.default(1, 1).curves[AGREEMENT]


def superset_of(case: oracle.Case) -> Superset:
    if case.guesses is None:
        return Superset.from_paths(case.rank_paths, 9, 9)
    num_guesses = case.guesses.tokens.shape[2]
    if case.by_parent:
        # Heads that no path uses do no harm.
        return Superset.from_paths(case.rank_paths, 3, num_guesses).by_parent()
    return Superset.from_paths(case.rank_paths, case.guesses.tokens.shape[1], num_guesses)


def nodes_of(case: oracle.Case, pool: int = UNLIMITED) -> Nodes:
    superset = superset_of(case)
    agreement = Agreement(CURVE, None, superset)
    return merge(superset, case.guesses, join(case.proposals), pool, agreement)


def ranked_of(
    case: oracle.Case, limits: list[int], weights: list[float] | None = None, **bounds: float
) -> Ranked:
    leaves = np.full(len(limits), int(bounds.pop("max_leaves", UNLIMITED)))
    worth = None if weights is None else np.array(weights)
    return rank(nodes_of(case), np.array(limits), leaves, weights=worth, **bounds)


def as_dicts(drafts: Drafts) -> list[dict[oracle.Path, tuple[float, int]]]:
    return [
        dict(
            zip(
                oracle.paths_of(draft),
                zip(draft.probability.tolist(), draft.source.tolist(), strict=True),
                strict=True,
            )
        )
        for draft in drafts
    ]


def same_trees(left: list[dict], right: list[dict]) -> bool:
    return [tree.keys() for tree in left] == [tree.keys() for tree in right] and all(
        a[path] == (pytest.approx(b[path][0]), b[path][1])
        for a, b in zip(left, right, strict=True)
        for path in a
    )


@given(oracle.cases(num_requests=2))
def test_merged_trees(case: oracle.Case) -> None:
    """Equal tokens under one parent are one node, whose probability counts what all propose."""
    drafts = ranked_of(case, [99, 99]).drafts
    assert same_trees(as_dicts(drafts), oracle.merge_slowly(case, 2, CURVE))


@given(oracle.cases(num_requests=3), st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_every_prefix_is_a_tree_of_the_likeliest(case: oracle.Case, limits: list[int]) -> None:
    drafts = ranked_of(case, limits).drafts
    for draft, limit, tree in zip(drafts, limits, oracle.merge_slowly(case, 3, CURVE), strict=True):
        paths = oracle.paths_of(draft)
        assert len(paths) == len(set(paths)) == min(limit, len(tree))
        assert draft.depths.tolist() == [len(path) for path in paths]
        assert (np.diff(draft.probability) <= 0).all()
        likeliest = sorted((p for p, _ in tree.values()), reverse=True)[: len(paths)]
        np.testing.assert_allclose(draft.probability, likeliest)


@given(oracle.cases(num_requests=2), st.integers(1, 12))
def test_pool_changes_nothing_within_it(case: oracle.Case, pool: int) -> None:
    limits, leaves = np.array([pool, pool]), np.array([UNLIMITED, UNLIMITED])
    expected = as_dicts(rank(nodes_of(case), limits, leaves).drafts)
    # Of equally likely nodes either may be kept.
    found = as_dicts(rank(nodes_of(case, pool), limits, leaves).drafts)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            [p for p, _ in one.values()], [p for p, _ in other.values()], rtol=1e-12
        )


@given(oracle.cases(num_requests=2), st.integers(1, 4))
def test_leaves_are_bounded(case: oracle.Case, max_leaves: int) -> None:
    """A node is kept if the forks above it are among the likeliest ``max_leaves - 1``."""
    drafts = ranked_of(case, [99, 99], max_leaves=max_leaves).drafts
    for draft, unbounded in zip(drafts, ranked_of(case, [99, 99]).drafts, strict=True):
        paths = oracle.paths_of(unbounded)
        forks = [
            path
            for place, path in enumerate(paths)
            if any(other[:-1] == path[:-1] for other in paths[:place])
        ]
        dropped = set(forks[max_leaves - 1 :])
        expected = [
            path
            for path in paths
            if not any(path[:depth] in dropped for depth in range(1, len(path) + 1))
        ]
        assert oracle.paths_of(draft) == expected
        assert oracle.num_forks(expected) < max_leaves


@given(
    oracle.cases(num_requests=2),
    st.lists(st.lists(st.integers(0, oracle.NUM_TOKENS - 1), min_size=4, max_size=4), min_size=2),
    st.lists(st.integers(0, 4), min_size=2, max_size=2),
)
def test_heads_learn_from_the_guesses_along_the_text(
    case: oracle.Case, texts: list[list[int]], counts: list[int]
) -> None:
    """Of each depth the guesses below the text so far, as long as the superset holds it."""
    assume(case.guesses is not None)
    assert case.guesses is not None
    superset, recorder = superset_of(case), Recorder()
    groups = np.zeros(len(superset.heads) * 10)
    source = HeadsSource(LogisticCurve(np.ones(1), groups), recorder, superset)
    source.guess(case.guesses.tokens, case.guesses.probability)
    source.learn(Emitted(np.array(texts[:2]), np.array(counts)))
    expected = [
        (case.guesses.probability[b, table, rank], token == texts[b][depth])
        for b in range(2)
        for depth, table in enumerate(oracle.tables_along(case, b, texts[b][: counts[b]]))
        for rank, token in enumerate(case.guesses.tokens[b, table])
    ]
    _, _, predicted, right = recorder.observations()
    np.testing.assert_allclose(predicted, [p for p, _ in expected], atol=1e-3)
    assert right.tolist() == [is_right for _, is_right in expected]


@given(
    oracle.cases(num_requests=2),
    st.lists(st.lists(st.integers(0, oracle.NUM_TOKENS - 1), min_size=4, max_size=4), min_size=2),
    st.lists(st.integers(0, 4), min_size=2, max_size=2),
)
def test_agreement_learns_from_the_candidates_along_the_text(
    case: oracle.Case, texts: list[list[int]], counts: list[int]
) -> None:
    assume(case.guesses is not None)
    superset, recorder = superset_of(case), Recorder()
    agreement = Agreement(CURVE, recorder, superset)
    merge(superset, case.guesses, join(case.proposals), UNLIMITED, agreement)
    agreement.learn(Emitted(np.array(texts[:2]), np.array(counts)))
    expected = []
    for b in range(2):
        for agreed, is_right in oracle.agreed_along(case, b, texts[b][: counts[b]], CURVE):
            log_odds = [0.0] * 6
            log_odds[2 * agreed.group : 2 * agreed.group + 2] = agreed.log_odds
            expected.append((agreed.group, *log_odds, agreed.probability, is_right))
    features, groups, predicted, right = recorder.observations()
    found = zip(groups, *features.T, predicted, right, strict=True)
    np.testing.assert_allclose(
        np.array(sorted(found)).reshape(-1, 9), np.array(sorted(expected)).reshape(-1, 9)
    )


@given(oracle.cases(num_requests=2), st.floats(0, 1))
def test_unlikely_nodes_are_left_out(case: oracle.Case, floor: float) -> None:
    drafts = ranked_of(case, [99, 99], min_probability=floor).drafts
    for draft, tree in zip(drafts, oracle.merge_slowly(case, 2, CURVE), strict=True):
        assert all(p >= floor for p in draft.probability)
        assert len(draft) == pytest.approx(sum(p >= floor for p, _ in tree.values()))


def curves(costs: list[float]) -> CostCurve:
    """Of two requests, by number of drafts."""
    return CostCurve({2: [(2 + drafts, ms) for drafts, ms in enumerate(costs)]})


rising_costs = st.lists(st.floats(0.05, 3), min_size=9, max_size=9).map(
    lambda steps: list(np.cumsum(steps))
)


weights_of_two = st.lists(st.floats(0.2, 5), min_size=2, max_size=2)


def worth_of(drafts: Drafts, weights: list[float]) -> float:
    """All that a step is expected to emit."""
    return sum(w * (1 + d.probability.sum()) for w, d in zip(weights, drafts, strict=True))


@given(oracle.cases(num_requests=2, max_nodes=2, max_depth=2), rising_costs, weights_of_two)
def test_budget_is_the_best_of_all_choices(
    case: oracle.Case, costs: list[float], weights: list[float]
) -> None:
    case.rank_paths = case.rank_paths[:2]
    ranked = ranked_of(case, [4, 4], weights)
    ms = curves(costs).by_drafts(2, 8)
    best, _ = best_size(ranked, ms)
    drafts = take(ranked, best)
    worth = {
        (b, path): p * weights[b]
        for b, tree in enumerate(as_dicts(ranked.drafts))
        for path, (p, _) in tree.items()
    }
    rates = [
        (sum(weights) + sum(worth[name] for name in chosen)) / ms[len(chosen)]
        for chosen in oracle.closed_sets(worth)
    ]
    assert worth_of(drafts, weights) / ms[best] == pytest.approx(max(rates))
    assert drafts.num_nodes.sum() == best


@given(oracle.cases(num_requests=2), rising_costs, weights_of_two)
def test_best_rate_of_candidates_is_that_of_their_trees(
    case: oracle.Case, costs: list[float], weights: list[float]
) -> None:
    case.guesses = None
    limits, others = np.array([4, 3]), join(case.proposals)
    ms = curves(costs).by_drafts(2, int(limits.sum()))
    _, rates = best_size(ranked_of(case, limits.tolist(), weights), ms)
    of_others = others.request, others.parents, others.probability
    rate = best_rate(*of_others, limits, np.array(weights), ms)
    assert rate == pytest.approx(rates.max())


@given(oracle.cases(num_requests=2), rising_costs, st.floats(0, 2), weights_of_two)
def test_forks_cost(
    case: oracle.Case, costs: list[float], fork_ms: float, weights: list[float]
) -> None:
    """The rate of every number of nodes counts the forks that its trees have."""
    ranked = ranked_of(case, [4, 4], weights)
    ms = curves(costs).by_drafts(2, len(ranked.order))
    best, rate = best_size(ranked, ms, fork_ms)
    for size in range(len(ranked.order) + 1):
        drafts = take(ranked, size)
        forks = sum(oracle.num_forks(oracle.paths_of(draft)) for draft in drafts)
        assert rate[size] == pytest.approx(worth_of(drafts, weights) / (ms[size] + fork_ms * forks))
    assert rate[best] == rate.max()


@given(oracle.cases(num_requests=3), st.integers(0, 30))
def test_take_is_a_prefix_of_each_request(case: oracle.Case, size: int) -> None:
    ranked = ranked_of(case, [9, 9, 9])
    drafts = take(ranked, size)
    for draft, whole in zip(drafts, ranked.drafts, strict=True):
        assert oracle.paths_of(draft) == oracle.paths_of(whole)[: len(draft)]
    left = np.sort(np.concatenate([d.probability for d in ranked.drafts]))[::-1]
    np.testing.assert_allclose(np.sort(drafts.probability)[::-1], left[:size])


@given(oracle.cases(num_requests=2))
def test_joined_sources(case: oracle.Case) -> None:
    joined = join(case.proposals)
    expected = [oracle.merged([source[b] for source in case.trees]) for b in range(2)]
    paths: list[oracle.Path] = []
    found: list[oracle.Tree] = [{}, {}]
    for place, parent in enumerate(joined.parents.tolist()):
        above = paths[parent] if parent >= 0 else ()
        paths.append((*above, int(joined.tokens[place])))
        assert len(paths[-1]) == joined.depths[place]
        entry = (float(joined.probability[place]), int(joined.source[place]))
        found[joined.request[place]][paths[-1]] = entry
    assert found == expected
    assert len(paths) == sum(map(len, expected))
