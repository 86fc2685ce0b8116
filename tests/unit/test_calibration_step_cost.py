"""Step costs and stages, from engines that only pretend."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_medusa.stepcost import measure as step_cost
from vllm_medusa.stepcost import stages
from vllm_medusa.tree.draft_tree import TreePath

PATHS: list[TreePath] = [(0,), (1,), (0, 0), (0, 1)]


class FakeEngine:
    """Steps take 10 ms, 1 ms more for each draft token, and are slower in later rounds."""

    log: list[tuple[int, int]] = []  # noqa: RUF012

    def __init__(self, options: dict[str, Any], environment: Any = None) -> None:
        self.speculative = options.get("speculative_config", {"tree": []})
        self.environment = environment
        self.num_runs = 0

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, prompts: list[list[int]], max_tokens: int, **sampling: Any) -> SimpleNamespace:
        assert sampling == {"ignore_eos": True}
        drafts = len(self.speculative["tree"])
        FakeEngine.log.append((drafts, len(prompts)))
        times = [500.0, *[10.0 + drafts + self.num_runs] * 5, 1.0]
        self.num_runs += 1
        step = {"prepare": 2.0, "plan": 0.5, "forward": 6.0, "attention": 2.0, "heads": 1.0}
        step["draft"] = 1.5
        return SimpleNamespace(
            decode_step_ms=times[1:-1],
            full_steps=(1, 6),
            stage_ms=[{"forward": 400.0}, *[step] * 6],
        )


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine.log = []
    for module in (step_cost, stages):
        monkeypatch.setattr(module, "start_engine", FakeEngine)


def measure(**changes: Any) -> Any:
    trees = step_cost.trees_to_measure(PATHS, (2, 4), num_heads=3)
    heads = {"method": "medusa", "model": "heads"}
    return step_cost.measure_step_costs(
        {"model": "m"}, heads, trees, range(300), (2, 1), rounds=3, **changes
    )


def test_engines_take_turns_and_the_first_round_warms_up() -> None:
    progress: list[int] = []
    costs = measure(progress=progress.append)
    turn = [0, 3, 2, 4]
    assert FakeEngine.log == [(d, b) for b in (1, 2) for _ in range(4) for d in turn]
    assert len(progress) == len(FakeEngine.log)
    rows = {(row.batch_size, row.num_drafts): row for row in costs.rows}
    assert rows[1, 4].round_ms == (15.0, 16.0, 17.0)
    assert rows[2, 0].round_ms == (15.0, 16.0, 17.0)  # the same engine's later runs
    assert [rows[1, d].num_leaves for d in turn] == [0, 1, 2, 3]


def test_one_engine_at_a_time() -> None:
    costs = measure(engines_at_once=1)
    assert [drafts for drafts, _ in FakeEngine.log] == [d for d in (0, 3, 2, 4) for _ in range(8)]
    assert costs.provenance["engines_at_once"] == 1
    assert len(costs.rows) == 8


def test_every_request_gets_forks() -> None:
    options = step_cost.with_tree({"model": "m"}, {"method": "medusa"}, tuple(PATHS), 32)
    assert options["speculative_config"]["max_tree_requests"] == 32
    assert options["speculative_config"]["tree"] == [list(path) for path in PATHS]
    assert step_cost.with_tree({"model": "m"}, {"method": "medusa"}, (), 32) == {"model": "m"}


@pytest.mark.parametrize("length", [10, 128, 200, 5000])
@pytest.mark.parametrize("count", [1, 7])
def test_prompts_of_one_length(length: int, count: int) -> None:
    prompts: Sequence[list[int]] = step_cost.cut_prompts(range(length), count)
    assert [len(prompt) for prompt in prompts] == [step_cost.PROMPT_TOKENS] * count
    assert all(0 <= token < length for prompt in prompts for token in prompt)
    if length >= 7 * step_cost.PROMPT_TOKENS:
        assert len({token for prompt in prompts for token in prompt}) == 128 * count


def test_stages_do_not_count_twice() -> None:
    (times,) = stages.measure_stages(
        {"model": "m"}, {"method": "medusa"}, [(), tuple(PATHS)], range(300), [2]
    )
    assert times.step_ms == 15.0  # 4 drafts, the second run
    assert times.stage_ms["prepare"] == 1.5
    assert times.stage_ms["forward"] == 4.0
    assert times.stage_ms["heads"] == 1.0
    assert times.stage_ms["draft"] == 0.5
    assert times.stage_ms["commit"] == 0.0
    assert times.rest_ms == pytest.approx(15 - 9.5)
    page = stages.stage_table([times]).markdown()
    assert "| 4 | 3 | 2 | 15.00 | 1.50 | 0.50 | 4.00 | 2.00 |" in page
