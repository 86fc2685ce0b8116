"""Dynamic trees on the real engine: outputs stay the same, and text and heads really draft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    return {"method": "medusa", "model": str(heads), "tree": "dynamic", **bounds}


@pytest.fixture(scope="module")
def demo_texts() -> tuple[list[Any], list[list[int]]]:
    """Prompts of the demo and how its model goes on, which is often what stood there before."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(DEMO / "model"))
    lines = (DEMO / "prompts.jsonl").read_text().splitlines()[:4]
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
        pay_for_everything(llm)
        assert greedy(llm, prompts, 96) == reference
        counted, metrics = counters(llm), spec_metrics(llm)
    tokens_per_step = 1 + metrics["num_accepted_tokens"] / metrics["num_drafts"]
    assert tokens_per_step > (1.6 if sources == ["heads"] else 2.5)
    assert counted["nodes_drafted"] >= metrics["num_draft_tokens"] > 100
    assert counted["forks_accepted"] > 5
    for name in ("heads", "text"):
        assert (counted[f"{name}_nodes"] > 50) == (name in sources)


def pay_for_everything(llm: Any) -> None:
    """Let every node pay, whatever this machine's costs are."""
    from vllm_medusa.draft.costs import CostCurve

    def replace(worker: Any) -> None:
        worker.model_runner.tree_drafter._drafter._costs = CostCurve({1: [(1, 1.0), (200, 1.0001)]})

    llm.collective_rpc(replace)


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
            with pytest.raises(VLLMValidationError, match=r"extra_args\['medusa'\]=.*is not known"):
                greedy(llm, prompts, 5, extra_args={"medusa": wrong})
        assert len(greedy(llm, prompts, 5)[0]) == 5
