"""Text with trees on Model Runner V2 is the text of no speculation, with the attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.integration.conftest import greedy, open_engine, spec_metrics
from tests.v2.conftest import MAX_TOKENS
from tests.v2.oracle import oracle
from tests.v2.trees import spec


@pytest.mark.parametrize("num_nodes", [8, 16, 63])
def test_greedy(
    engine: Callable[..., Any],
    tiny_heads: Path,
    prompts: list[Any],
    reference: list[list[int]],
    num_nodes: int,
) -> None:
    count = 4 if num_nodes < 63 else 2
    prompts, reference = prompts[:count], reference[:count]
    with (
        oracle(prompts, reference) as drafts,
        engine(speculative_config=spec(tiny_heads, num_nodes)) as llm,
    ):
        config = llm.llm_engine.vllm_config
        assert config.use_v2_model_runner
        assert config.scheduler_config.async_scheduling
        assert greedy(llm, prompts, MAX_TOKENS) == reference
        metrics = spec_metrics(llm)
    assert len(drafts.chosen) > 6
    assert metrics["num_accepted_tokens"] > 8 * count


def test_windows_and_soft_caps(tmp_path: Path, tiny_heads: Path, prompts: list[Any]) -> None:
    """Gemma 2: layers with a window beside layers without, in two groups of the KV cache."""
    model = tiny.make_windowed_model(tmp_path / "windowed")
    options = {"max_model_len": 256, "max_num_seqs": 4}
    prompts = [prompt for prompt in prompts if len(prompt["prompt_token_ids"]) > 30][:2]
    with open_engine(model, **options) as llm:
        reference = greedy(llm, prompts, 16)
    with (
        oracle(prompts, reference),
        open_engine(model, speculative_config=spec(tiny_heads), **options) as llm,
    ):
        assert greedy(llm, prompts, 16) == reference
        assert spec_metrics(llm)["num_accepted_tokens"] > 10


def test_another_engine_of_the_process_has_plain_attention(
    engine: Callable[..., Any], tiny_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    before = AttentionBackendEnum.TRITON_ATTN.get_path()
    with engine(speculative_config=spec(tiny_heads, 4)):
        assert AttentionBackendEnum.TRITON_ATTN.get_path() == before
    with engine() as llm:
        assert greedy(llm, prompts[:1], 6) == [reference[0][:6]]
