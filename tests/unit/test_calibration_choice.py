"""From acceptance lengths and step costs to a tree schedule."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path

import pytest

from vllm_medusa.calibration.choice import Candidate, choose
from vllm_medusa.errors import UserError
from vllm_medusa.stepcost.costs import StepCost, StepCosts, read_step_costs
from vllm_medusa.tree.draft_tree import DraftTree, TreePath

PATHS: list[TreePath] = [(0,), (1,), (0, 0), (2,), (0, 1), (1, 0), (0, 0, 0), (3,)]


def costs_of(table: dict[int, dict[tuple[int, int], list[float]]]) -> StepCosts:
    rows = [
        StepCost(batch_size, drafts, leaves, tuple(times))
        for batch_size, row in table.items()
        for (drafts, leaves), times in row.items()
    ]
    return StepCosts(rows, {})


def candidates(*lengths: float) -> list[Candidate]:
    """None, the chain of 3, and trees of 4 and 8."""
    paths = [(), DraftTree.chain(3).paths, tuple(PATHS[:4]), tuple(PATHS)]
    return [
        Candidate(str(len(p)), p, length) for p, length in zip(paths, (1.0, *lengths), strict=True)
    ]


def test_costs_are_ratios_within_rounds() -> None:
    # The second round is twice as slow for all: no ratio changes.
    costs = costs_of({1: {(0, 0): [10, 20], (3, 1): [11, 22], (4, 3): [12, 24], (8, 5): [16, 32]}})
    relative = costs.relative(1, PATHS)
    assert (relative.low, relative.value, relative.high) == pytest.approx((1.6, 1.6, 1.6))
    assert costs.relative(1, PATHS[:6]).value == pytest.approx(1.4)  # between the trees
    assert costs.relative(1, PATHS[:2]).value == pytest.approx(1.1)  # not on the chain's line
    assert costs.relative(1, DraftTree.chain(2).paths).value == pytest.approx(1 + 0.1 * 2 / 3)
    assert costs.relative(1, ()).value == 1
    assert costs.baseline_ms(1) == 15


def test_larger_trees_than_measured_are_refused() -> None:
    costs = costs_of({1: {(0, 0): [10], (4, 3): [12]}})
    with pytest.raises(UserError, match="up to 4 draft tokens, but the tree has 8"):
        costs.relative(1, PATHS)


def test_the_schedule_takes_what_pays() -> None:
    costs = costs_of(
        {
            1: {(0, 0): [10], (3, 1): [10.5], (4, 3): [11], (8, 5): [12]},
            2: {(0, 0): [10], (3, 1): [10.5], (4, 3): [11], (8, 5): [12]},
            8: {(0, 0): [10], (3, 1): [13], (4, 3): [14], (8, 5): [30]},
            32: {(0, 0): [10], (3, 1): [20], (4, 3): [30], (8, 5): [60]},
        }
    )
    choice = choose(candidates(1.4, 1.6, 2.0), costs)
    assert choice.chosen == {1: 3, 2: 3, 8: 2, 32: 0}
    assert choice.predictions[8][2].speedup == pytest.approx(1.6 / 1.4)
    assert choice.predictions[8][2].tokens_per_second == pytest.approx(8 * 1.6 / 0.014)
    schedule = choice.schedule()
    assert schedule is not None
    assert [(e.max_batch_size, len(e.paths)) for e in schedule.entries] == [
        (2, 8),
        (8, 4),
        (None, 0),
    ]


def test_no_gain_is_no_schedule() -> None:
    costs = costs_of({1: {(0, 0): [10], (3, 1): [20], (4, 3): [30], (8, 5): [60]}})
    assert choose(candidates(1.4, 1.6, 2.0), costs).schedule() is None


def test_trees_lie_within_one_another_at_the_least_loss() -> None:
    """Against all choices: noise makes larger trees look better at larger batches."""
    rng = random.Random(5)
    for _ in range(50):
        table = {
            batch_size: {
                key: [10 * rng.uniform(1.0, 2.0)] if key[0] else [10.0]
                for key in ((0, 0), (3, 1), (4, 3), (8, 5))
            }
            for batch_size in (1, 4, 16)
        }
        given = candidates(1.4, 1.6, 2.0)
        choice = choose(given, costs_of(table))

        def score(indices: tuple[int, ...], choice=choice, given=given) -> float:
            predictions = zip(choice.predictions.values(), indices, strict=True)
            nodes = sum(len(given[index].paths) for index in indices)
            return sum(math.log(row[index].speedup) for row, index in predictions) - 2e-4 * nodes

        nested = [
            indices
            for indices in itertools.product(range(4), repeat=3)
            if all(
                set(given[small].paths) <= set(given[large].paths)
                for large, small in itertools.pairwise(indices)
            )
        ]
        assert score(tuple(choice.chosen.values())) == pytest.approx(max(map(score, nested)))


def test_costs_go_through_a_file(tmp_path: Path) -> None:
    costs = costs_of({1: {(0, 0): [10, 11], (4, 3): [12, 13]}})
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(costs.to_dict()))
    assert read_step_costs(path).rows == costs.rows
    path.write_text(json.dumps({"step_costs": costs.to_dict()}))
    assert read_step_costs(path).rows == costs.rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "format None"),
        ('{"format": "vllm_medusa.step_costs/1", "rows": []}', "damaged"),
        (
            '{"format": "vllm_medusa.step_costs/1", "provenance": {}, "rows": []}',
            "hold no measurements",
        ),
        (
            '{"format": "vllm_medusa.step_costs/1", "provenance": {}, "rows": [{"batch_size": 1, '
            '"num_drafts": 4, "num_leaves": 2, "round_ms": [3]}]}',
            "lack a row without speculation, or a tree, at batch size 1",
        ),
    ],
)
def test_bad_cost_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_step_costs(path)
    with pytest.raises(UserError, match="No such file"):
        read_step_costs(tmp_path / "none.json")
