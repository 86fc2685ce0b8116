"""Path statistics on ranks written out by hand."""

from __future__ import annotations

import numpy as np

from vllm_medusa.acceptance.statistics import (
    RANK_CAP,
    head_accuracy,
    position_average,
    simulate,
    step_counts,
)
from vllm_medusa.acceptance.trees import best_paths, product_paths, step_paths

MISS = RANK_CAP


def test_joint_counts_see_what_products_do_not() -> None:
    # Head 1 is right with rank 1 exactly where head 0 is right with rank 1.
    ranks = np.array([[0, 0]] * 3 + [[1, 1]] * 2 + [[0, MISS]] * 1)
    assert best_paths([ranks], 4) == [(0,), (0, 0), (1,), (1, 1)]
    # By the product, (0, 1) is as good a guess as any: 4/6 * 2/6.
    assert (0, 1) in product_paths([ranks], 5)
    assert (0, 1) not in best_paths([ranks], 100)


def test_steps_begin_after_what_the_last_one_emitted() -> None:
    ranks = np.array([[0, 0], [MISS, 0], [0, MISS], [0, 0], [0, 0]])
    chain = [(0,), (0, 0)]
    # Position 0 emits 3, position 3 emits 3 (of which one is past the end).
    assert step_counts([ranks], chain).tolist() == [[6, 2]]
    assert simulate([ranks], chain) == 3
    assert position_average([ranks], chain) == 1 + (2 + 0 + 1 + 2 + 2) / 5
    assert simulate([ranks], []) == 1


def test_paths_count_where_steps_begin() -> None:
    # Looping text: all right, everywhere. Other text: head 0 is right with rank 1, and no more.
    looping = np.zeros((60, 4), dtype=np.int64)
    other = np.array([[1, MISS, MISS, MISS]] * 40)
    texts = [looping, other]
    # Over all positions the chain is right more often than (1,): 60 to 40.
    assert best_paths(texts, 4) == [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]
    # But once (0,) is drafted, only 30 of the 60 begin a step.
    assert step_paths(texts, 2) == [(0,), (1,)]
    assert simulate(texts, step_paths(texts, 4)) > simulate(texts, best_paths(texts, 4))


def test_equally_frequent_paths_are_ordered_by_their_products() -> None:
    # (0, 5) and (1, 0) were right once each, but rank 0 of head 1 is the usual one.
    ranks = np.array([[0, 5], [1, 0], [2, 0], [0, 0], [0, 0]])
    paths = best_paths([ranks], 10)
    assert paths.index((1, 0)) < paths.index((0, 5))


def test_without_positions_nothing_is_known() -> None:
    for texts in ([], [np.zeros((0, 3), dtype=np.int64)]):
        for find in (best_paths, step_paths, product_paths):
            assert find(texts, 4) == []
        assert simulate(texts, [(0,)]) == position_average(texts, [(0,)]) == 1


def test_head_accuracy() -> None:
    ranks = np.array([[0, 4], [1, 9], [10, MISS]])
    assert head_accuracy([ranks], (1, 5, 10)) == {
        1: [1 / 3, 0],
        5: [2 / 3, 1 / 3],
        10: [2 / 3] * 2,
    }
