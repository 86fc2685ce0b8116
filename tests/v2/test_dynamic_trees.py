"""Dynamic trees: each request's and step's own, chosen on the device; text of no speculation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.integration.conftest import greedy, spec_metrics, token_ids
from tests.v2.accepted import accepted
from tests.v2.conftest import MAX_TOKENS
from tests.v2.guesser import guesser
from tests.v2.trees import dynamic

pytestmark = pytest.mark.usefixtures("fast_attention")

Engine = Callable[..., Any]


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "seeded"])
def test_text_of_no_speculation(
    engine: Engine,
    tiny_heads: Path,
    prompts: list[Any],
    temperature: float,
) -> None:
    params = [
        SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            detokenize=False,
        )
        for seed in range(4)
    ]
    prompts = prompts[:4]
    with engine() as llm:
        reference = token_ids(llm.generate(prompts, params, use_tqdm=False))
    with (
        guesser(prompts, reference) as guesses,
        accepted() as taken,
        engine(speculative_config=dynamic(tiny_heads)) as llm,
    ):
        config = llm.llm_engine.vllm_config
        assert config.use_v2_model_runner
        assert config.scheduler_config.async_scheduling
        assert token_ids(llm.generate(prompts, params, use_tqdm=False)) == reference
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 25
    assert len(guesses.shapes) > 10
    assert len(taken.nodes) > 5
    assert taken.num_forks > 5


def test_real_heads(
    engine: Engine, tiny_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    with engine(speculative_config=dynamic(tiny_heads, max_depth=2)) as llm:
        assert greedy(llm, prompts[:2], 8) == [text[:8] for text in reference[:2]]
        assert spec_metrics(llm)["num_draft_tokens"] > 0
