"""Dynamic trees on the real engine: outputs stay the same, and text and heads really draft."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.integration.conftest import (
    counters,
    draft_with,
    greedy,
    make_oracle,
    open_engine,
    random_prompts,
    spec_metrics,
)

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo"


def dynamic(heads: Path, **bounds: Any) -> dict[str, Any]:
    """Trees of as many nodes as may be, whatever this machine's costs are."""
    return {
        "method": "medusa",
        "model": str(heads),
        "tree": "dynamic",
        "measure_costs": False,
        **bounds,
    }


@pytest.fixture(scope="module")
def demo_texts() -> tuple[list[Any], list[list[int]]]:
    """Prompts of the demo and how its model goes on, which is often what stood there before."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(DEMO / "model"))
    lines = (DEMO / "prompts.jsonl").read_text().splitlines()[:8]
    prompts = [{"prompt_token_ids": tokenizer(json.loads(x)["prompt"])["input_ids"]} for x in lines]
    with open_engine(DEMO / "model") as llm:
        return prompts, greedy(llm, prompts, 96)


@pytest.mark.parametrize("sources", [["heads", "text"], ["text"], ["heads"]])
def test_text_is_that_of_no_speculation(
    demo_texts: tuple[list[Any], list[list[int]]], sources: list[str]
) -> None:
    prompts, reference = demo_texts
    spec = dynamic(DEMO / "heads", sources=sources)
    with open_engine(DEMO / "model", speculative_config=spec) as llm:
        assert greedy(llm, prompts, 96) == reference
        counted, metrics = counters(llm), spec_metrics(llm)
    tokens_per_step = 1 + metrics["num_accepted_tokens"] / metrics["num_drafts"]
    assert tokens_per_step > (1.6 if sources == ["heads"] else 2.5)
    assert counted["nodes_drafted"] >= metrics["num_draft_tokens"] > 100
    assert counted["forks_accepted"] > 10
    for name in ("heads", "text"):
        assert (counted[f"{name}_nodes"] > 50) == (name in sources)
        assert (counted[f"{name}_accepted"] > 20) == (name in sources)
        assert counted[f"{name}_accepted"] <= metrics["num_accepted_tokens"]
    # Of a node that both proposed both are counted.
    by_source = counted["heads_accepted"] + counted["text_accepted"]
    assert (by_source == metrics["num_accepted_tokens"]) == (len(sources) == 1)
    assert by_source >= metrics["num_accepted_tokens"]
    assert counted["shared_text_nodes"] == counted["shared_text_accepted"] == 0


def test_no_setting_is_needed(
    demo_texts: tuple[list[Any], list[list[int]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With this machine's own costs."""
    prompts, reference = demo_texts
    monkeypatch.setattr("vllm.envs.VLLM_CACHE_ROOT", str(tmp_path), raising=False)
    spec = {"method": "medusa", "model": str(DEMO / "heads")}
    with open_engine(DEMO / "model", speculative_config=spec) as llm:
        assert greedy(llm, prompts, 96) == reference
        assert counters(llm)["heads_runs"] > 20
    assert list((tmp_path / "medusa_step_costs").iterdir())


@pytest.mark.parametrize("shared_text", [False, True])
def test_outputs_of_finished_requests(
    engine: Callable[..., Any], tiny_heads: Path, shared_text: bool
) -> None:
    prompts = random_prompts(4, seed=11)
    with engine() as llm:
        reference = greedy(llm, prompts, 60)
    spec = dynamic(tiny_heads, sources=["heads"], shared_text=shared_text, learn=False)
    with engine(speculative_config=spec) as llm:
        steps = []
        for _ in range(2):
            before = spec_metrics(llm)["num_drafts"]
            assert greedy(llm, prompts, 60) == reference
            steps.append(spec_metrics(llm)["num_drafts"] - before)
        counted = counters(llm)
    assert (counted["shared_text_nodes"] > 100) == shared_text
    assert (counted["shared_text_accepted"] > 100) == shared_text
    assert (steps[1] < steps[0] / 3) == shared_text


@pytest.mark.parametrize("max_nodes", [1, 3, 9])
def test_bounds(engine: Callable[..., Any], tiny_heads: Path, max_nodes: int) -> None:
    prompts = random_prompts(3, seed=4)
    with engine() as llm:
        reference = greedy(llm, prompts, 40)
    spec = dynamic(tiny_heads, max_nodes=max_nodes, max_depth=2, sources=["heads"])
    with engine(speculative_config=spec) as llm:
        assert greedy(llm, prompts, 40) == reference
        metrics, counted = spec_metrics(llm), counters(llm)
    assert counted["nodes_drafted"] >= metrics["num_draft_tokens"] > 0
    assert metrics["num_draft_tokens"] <= max_nodes * metrics["num_drafts"]
    # The heads always have as many candidates; close to its end a request drafts less.
    assert metrics["num_draft_tokens"] > 0.7 * max_nodes * metrics["num_drafts"]
    assert len(metrics["num_accepted_tokens_per_pos"]) == min(2, max_nodes)


class TestStepCosts:
    """What the engine measures when it starts is kept on the disk."""

    @pytest.fixture(autouse=True)
    def measured(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How often costs were measured, in a cache of the test's own."""
        from vllm_medusa.plugin.worker.v1 import warm_up

        monkeypatch.setattr("vllm.envs.VLLM_CACHE_ROOT", str(tmp_path), raising=False)
        measure, calls = warm_up._measure, []

        def count(*args: Any) -> Any:
            calls.append(1)
            return measure(*args)

        monkeypatch.setattr(warm_up, "_measure", count)
        return calls

    @pytest.fixture
    def costs(self, engine: Callable[..., Any], tiny_heads: Path) -> Callable[..., Any]:
        """The costs with which an engine starts."""

        def start(**options: Any) -> Any:
            spec = dynamic(tiny_heads, measure_costs=True, **options.pop("keys", {}))
            with engine(speculative_config=spec, **options) as llm:
                (costs,) = llm.collective_rpc(lambda w: w.model_runner.tree_drafter._drafter._costs)
                return costs.to_dict()

        return start

    def test_are_measured_once(
        self, costs: Callable[..., Any], measured: list[int], tmp_path: Path
    ) -> None:
        first = costs()
        assert [size for size, _ in first["points"]["1"]][:4] == [1, 2, 3, 4]
        assert costs() == costs(keys={"max_nodes": 4, "learn": False}) == first
        assert len(measured) == 1
        costs(max_num_batched_tokens=64)
        costs(dtype="float16")
        assert len(measured) == 3
        assert len(list((tmp_path / "medusa_step_costs").iterdir())) == 3

    def test_what_steps_take_beside_them_is_learnt(
        self, engine: Callable[..., Any], tiny_heads: Path
    ) -> None:
        """From steps of the same requests only."""
        spec = dynamic(tiny_heads, measure_costs=True)
        with engine(speculative_config=spec) as llm:

            def learnt() -> dict[int, float]:
                (overhead,) = llm.collective_rpc(
                    lambda w: w.model_runner.tree_drafter._drafter._overhead
                )
                return {size: float(overhead.corrected(size, np.ones(1))[0]) for size in (1, 3, 4)}

            assert set(learnt().values()) == {1.0}
            greedy(llm, random_prompts(3), 60)
            found = learnt()
            assert found[3] != 1.0
            assert found[4] == 1.0

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[: len(text) // 2],
            lambda text: "[]",
            lambda text: "{}",
            lambda text: text.replace('"points"', '"spots"'),
            lambda text: text.replace('"fork_ms": ', '"fork_ms": -'),
            lambda text: text.replace('"fork_ms": ', '"fork_ms": NaN, "more": '),
            lambda text: text.replace('"facts": {', '"facts": {"other": 1, '),
        ],
    )
    def test_a_damaged_file_is_replaced(
        self,
        costs: Callable[..., Any],
        measured: list[int],
        tmp_path: Path,
        damage: Callable[[str], str],
    ) -> None:
        costs()
        (path,) = (tmp_path / "medusa_step_costs").iterdir()
        whole = path.read_text()
        path.write_text(damage(whole))
        assert path.read_text() != whole
        second = costs()
        assert len(measured) == 2
        assert costs() == second
        assert len(measured) == 2

    def test_a_cache_that_cannot_be_written(
        self, costs: Callable[..., Any], measured: list[int], tmp_path: Path
    ) -> None:
        (tmp_path / "medusa_step_costs").write_text("in the way")
        assert costs()["points"]
        assert len(measured) == 1

    def test_are_not_measured_if_not_wanted(
        self, engine: Callable[..., Any], tiny_heads: Path, measured: list[int], tmp_path: Path
    ) -> None:
        with engine(speculative_config=dynamic(tiny_heads)):
            assert not measured
        assert not list(tmp_path.iterdir())


def test_requests_that_want_no_drafts_cost_nothing(
    engine: Callable[..., Any], tiny_heads: Path
) -> None:
    with engine(speculative_config=dynamic(tiny_heads)) as llm:
        greedy(llm, random_prompts(3), 20, extra_args={"medusa": {"max_nodes": 0}})
        assert not any(counters(llm).values())
        greedy(llm, random_prompts(3), 20, extra_args={"medusa": {"max_nodes": 2}})
        assert counters(llm)["heads_runs"] > 3
        assert counters(llm)["nodes_drafted"] <= 2 * 3 * 20


def test_a_line_for_each_step(
    engine: Callable[..., Any], tiny_heads: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vllm_logger = logging.getLogger("vllm")
    vllm_logger.addHandler(caplog.handler)
    try:
        with engine(speculative_config=dynamic(tiny_heads, max_nodes=5)) as llm:
            greedy(llm, random_prompts(2), 20)
            assert "Medusa: trees" not in caplog.text
            caplog.set_level(logging.DEBUG, "vllm")
            greedy(llm, random_prompts(2), 20)
    finally:
        vllm_logger.removeHandler(caplog.handler)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Medusa: trees")]
    assert len(lines) > 5
    assert re.fullmatch(
        r"Medusa: trees of \[5, 5\] nodes; \d+ from the heads, \d+ from text, 0 from shared text; "
        r"\d+\.\d\d tokens expected",
        lines[1],
    )


def test_trees_of_another_shape_at_every_step(engine: Callable[..., Any], tiny_heads: Path) -> None:
    prompts = random_prompts(5, seed=7)
    with engine() as llm:
        reference = greedy(llm, prompts, 120)
    oracle = make_oracle(prompts, reference)
    with engine(speculative_config=dynamic(tiny_heads, max_nodes=20)) as llm:
        draft_with(llm, lambda runner: tiny.OracleDrafter(oracle, runner))
        assert greedy(llm, prompts, 120) == reference
        assert counters(llm)["forks_accepted"] > 20
        assert spec_metrics(llm)["num_accepted_tokens"] > 100
    assert len(oracle.chosen) > 10


def test_a_request_bounds_its_own_trees(engine: Callable[..., Any], tiny_heads: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    prompts = random_prompts(1, seed=2)
    spec = {"method": "medusa", "model": str(tiny_heads), "tree": "cpu-16"}
    with engine(speculative_config=spec) as llm:
        drafted = []
        for max_nodes in ({"max_nodes": 0}, '{"max_nodes": 3}', None):
            before = spec_metrics(llm)
            extra_args = None if max_nodes is None else {"medusa": max_nodes}
            greedy(llm, prompts, 20, extra_args=extra_args)
            after = spec_metrics(llm)
            steps = after["num_drafts"] - before["num_drafts"]
            nodes = after["num_draft_tokens"] - before["num_draft_tokens"]
            drafted.append(nodes / steps if steps else 0)
        assert drafted[0] == 0
        assert 0 < drafted[1] <= 3 < drafted[2]
        for wrong in ({"max_nodes": -1}, {"nodes": 3}, 7, "{", {"max_nodes": True}):
            with pytest.raises(
                VLLMValidationError, match=r"extra_args\['medusa'\]=.*(is unknown|must be)"
            ):
                greedy(llm, prompts, 5, extra_args={"medusa": wrong})
        assert len(greedy(llm, prompts, 5)[0]) == 5
