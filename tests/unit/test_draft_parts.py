"""The superset of rank paths, cost curves, and drafts as arrays."""

from __future__ import annotations

import itertools
from math import prod

import numpy as np
import pytest

from vllm_medusa.draft.costs import CostCurve, step_sizes
from vllm_medusa.draft.superset import MAX_PATHS, Superset
from vllm_medusa.draft.types import Drafts
from vllm_medusa.errors import UserError
from vllm_medusa.tree import DraftTree


def paths_of(superset: Superset, num_guesses: int) -> list[tuple[int, ...]]:
    paths: dict[int, tuple[int, ...]] = {len(superset): ()}
    for place, (parent, cell) in enumerate(
        zip(superset.parents.tolist(), superset.cells.tolist(), strict=True)
    ):
        paths[place] = (*paths[parent], cell % num_guesses)
        assert len(paths[place]) == superset.depths[place] == cell // num_guesses + 1
    return [paths[place] for place in range(len(superset))]


def test_superset_of_products_holds_the_likeliest() -> None:
    probability = np.array([[0.5, 0.2, 0.11], [0.4, 0.31, 0.07], [0.6, 0.23, 0.13]])
    products = {
        path: prod(probability[depth, rank] for depth, rank in enumerate(path))
        for depth in (1, 2, 3)
        for path in itertools.product(range(3), repeat=depth)
    }
    likeliest = sorted(products, key=lambda path: -products[path])
    for size in (1, 5, 20, 39):
        superset = Superset.from_product(probability, size)
        assert set(paths_of(superset, 3)) == set(likeliest[:size])


def test_superset_is_bounded() -> None:
    assert len(Superset.from_product(np.full((4, 10), 0.1), 10**6)) == MAX_PATHS
    # The likeliest first: what is cut off is the end.
    many = [(rank,) for rank in range(MAX_PATHS + 5)]
    assert len(Superset.from_paths(many, 1, len(many))) == MAX_PATHS


def test_superset_of_a_static_tree() -> None:
    tree = DraftTree.from_paths([(0,), (1,), (0, 0), (0, 2), (0, 2, 1)])
    superset = Superset.of_tree(tree)
    assert set(paths_of(superset, tree.top_k)) == set(tree.paths)
    paths = paths_of(superset, tree.top_k)
    for place, path in [*enumerate(paths), (len(superset), ())]:
        for rank, child in enumerate(superset.children[place].tolist()):
            assert (child >= 0) == ((*path, rank) in paths)
            assert child < 0 or paths[child] == (*path, rank)
    assert (superset.children[-1] == -1).all()


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0, 1)], r"\[0, 1\] of the superset has no parent"),
        ([(0,), (3,)], "more than 2 heads or 3 guesses"),
        ([(0,), (0, 0), (0, 0, 0)], "more than 2 heads"),
    ],
)
def test_bad_superset(paths: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Superset.from_paths(paths, 2, 3)


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = CostCurve({1: [(1, 10), (5, 14)], 4: [(4, 20), (8, 28)]})
    np.testing.assert_allclose(costs.by_drafts(1, 6), [10, 11, 12, 13, 15, 15, 17])
    np.testing.assert_allclose(costs.by_drafts(4, 3), [20, 24, 24, 28])
    # Halfway between one request and four there is no whole number: two are a third of the way.
    np.testing.assert_allclose(costs.by_drafts(2, 1), [10 + 10 / 3, 11 + 11 / 3])
    # Beyond the last as many tokens cost the same.
    np.testing.assert_allclose(costs.by_drafts(10, 4), [36, 36, 36, 44, 44])


def test_more_tokens_can_cost_less() -> None:
    costs = CostCurve({1: [(1, 10), (2, 9), (3, 12), (4, 11)]})
    np.testing.assert_allclose(costs.by_drafts(1, 5), [10, 9, 12, 11, 11, 11])


def test_a_step_costs_what_its_size_costs() -> None:
    sizes = step_sizes(np.arange(1, 300))
    assert np.unique(sizes).tolist() == [
        *(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384),
    ]
    assert (sizes >= np.arange(1, 300)).all()
    # With steps of 16, 24 and 32 tokens measured, one of 17 is one of 24.
    costs = CostCurve({1: [(1, 10), (16, 10), (24, 12), (32, 12)]})
    np.testing.assert_allclose(costs.by_drafts(14, 6), [10, 10, 10, 12, 12, 12, 12])
    # Halfway between 1 and 29 requests.
    costs = CostCurve({1: [(1, 10), (31, 40)], 29: [(29, 40), (59, 70)]})
    np.testing.assert_allclose(costs.by_drafts(15, 4), [26, 26, 34, 34, 34])


def test_costs_of_heads_by_batch_size() -> None:
    costs = CostCurve({1: [(1, 10)]}, heads=[(1, 2), (9, 4), (11, 8)])
    assert [costs.heads_ms(size) for size in (1, 5, 9, 12)] == [2, 3, 4, 10]
    assert CostCurve.from_dict(costs.to_dict()).heads_ms(5) == 3
    assert CostCurve({1: [(1, 10)]}).heads_ms(5) == 0


@pytest.mark.parametrize("points", [{}, {1: []}, {1: [(1, 0.0)]}, {1: [(0, 1.0)]}])
def test_bad_costs(points: dict[int, list[tuple[int, float]]]) -> None:
    with pytest.raises(UserError, match="step costs must have"):
        CostCurve(points)
    with pytest.raises(UserError, match="step costs must have"):
        CostCurve({1: [(1, 10)]}, heads=[(1, -1.0)])


def test_no_drafts() -> None:
    drafts = Drafts.none(3)
    assert len(drafts) == 3
    assert [len(draft) for draft in drafts] == [0, 0, 0]
    assert drafts.num_nodes.tolist() == [0, 0, 0]
