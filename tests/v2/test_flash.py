"""FlashAttention attends to the context and the tree kernel to the tree: the text is the same.

vLLM's FlashAttention backend runs as it is; `flash` stands for the function that it calls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.integration.conftest import greedy, open_engine, spec_metrics
from tests.v2.conftest import IS_INTERPRETED
from tests.v2.flash import flash_attention
from tests.v2.oracle import oracle
from tests.v2.trees import spec

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="stands for FlashAttention on a CPU")

NUM_LAYERS = 2


@pytest.mark.parametrize("version", [2, 3])
def test_greedy(
    engine: Callable[..., Any],
    tiny_heads: Path,
    prompts: list[Any],
    reference: list[list[int]],
    version: int,
) -> None:
    """Whole batches with trees, and trees beside parts of prompts."""
    settings = {"speculative_config": spec(tiny_heads), "max_num_batched_tokens": 96}
    with (
        flash_attention(version) as flash,
        oracle(prompts, reference),
        engine(**settings) as llm,
    ):
        assert greedy(llm, prompts[:4], 24) == reference[:4]
        assert spec_metrics(llm)["num_accepted_tokens"] > 8 * 4
    assert len(flash.contexts) > 6 * NUM_LAYERS


def test_layers_with_windows_stay_with_the_tree_kernel(
    tmp_path: Path, tiny_heads: Path, prompts: list[Any]
) -> None:
    """Gemma 2: every second layer has a window; FlashAttention knows soft caps."""
    model = tiny.make_windowed_model(tmp_path / "windowed")
    options = {"max_model_len": 256, "max_num_seqs": 4}
    prompts = [prompt for prompt in prompts if len(prompt["prompt_token_ids"]) > 30][:2]
    with open_engine(model, **options) as llm:
        reference = greedy(llm, prompts, 16)
    with (
        flash_attention(3) as flash,
        oracle(prompts, reference),
        open_engine(model, speculative_config=spec(tiny_heads), **options) as llm,
    ):
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        windows = [layer.impl.sliding_window[0] for layer in layers.values()]
        caches = {layer.kv_cache.data_ptr() for layer in layers.values()}
        assert greedy(llm, prompts, 16) == reference
        assert spec_metrics(llm)["num_accepted_tokens"] > 10
    assert 0 < windows.count(-1) < len(windows)
    read = {call["key"].data_ptr() for call in flash.contexts}
    assert len(read & caches) == len(read) == windows.count(-1)
