"""FlashInfer attends to the context and the tree kernel to the tree: the text is the same.

vLLM's FlashInfer backend runs as it is; `flashinfer` stands for the kernels that it calls.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import greedy, spec_metrics
from tests.v2.conftest import IS_INTERPRETED
from tests.v2.flashinfer import flashinfer_attention
from tests.v2.oracle import oracle
from tests.v2.trees import spec

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="stands for FlashInfer on a CPU")

NUM_LAYERS = 2


@pytest.mark.parametrize(
    "settings_of_kernel", [{}, {"returns_sums": False}, {"workspace_bytes": 2**20}]
)
def test_greedy(
    engine: Callable[..., Any],
    tiny_heads: Path,
    prompts: list[Any],
    reference: list[list[int]],
    settings_of_kernel: dict[str, Any],
) -> None:
    """Whole batches with trees, and trees beside parts of prompts."""
    settings = {"speculative_config": spec(tiny_heads), "max_num_batched_tokens": 96}
    with (
        flashinfer_attention(**settings_of_kernel) as stand_in,
        oracle(prompts, reference),
        engine(attention_backend="FLASHINFER", **settings) as llm,
    ):
        assert greedy(llm, prompts[:4], 24) == reference[:4]
        assert spec_metrics(llm)["num_accepted_tokens"] > 8 * 4
    assert stand_in.num_causal["prompts"] >= 2 * NUM_LAYERS
    if not settings_of_kernel:
        assert len(stand_in.contexts) > 6 * NUM_LAYERS
    else:
        assert not stand_in.contexts
