"""Backends that attend to the context themselves get it, and in persistent tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import greedy
from tests.v2.conftest import IS_INTERPRETED
from tests.v2.flash import flash_attention
from tests.v2.flashinfer import flashinfer_attention
from tests.v2.oracle import oracle
from tests.v2.trees import spec

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="stands for kernels on a CPU")

NUM_LAYERS = 2


@pytest.fixture(params=["FLASH_ATTN", "FLASHINFER"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stand_in_of(backend: str) -> AbstractContextManager[Any]:
    return flash_attention(3) if backend == "FLASH_ATTN" else flashinfer_attention()


@pytest.mark.parametrize("wrong", ["too short", "too long"])
def test_a_wrong_context_changes_the_text(
    engine: Callable[..., Any],
    tiny_heads: Path,
    prompts: list[Any],
    reference: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    wrong: str,
) -> None:
    from vllm_medusa.plugin.worker.v2 import runner

    original = runner.TreeRunnerMixin._prepare_trees

    def prepare(self: Any, input_batch: Any) -> None:
        original(self, input_batch)
        self.trees.context_lens += 1 if wrong == "too long" else -1

    monkeypatch.setattr(runner.TreeRunnerMixin, "_prepare_trees", prepare)
    with (
        stand_in_of(backend),
        oracle(prompts, reference),
        engine(attention_backend=backend, speculative_config=spec(tiny_heads)) as llm,
    ):
        assert greedy(llm, prompts[:2], 12) != [text[:12] for text in reference[:2]]


def test_every_step_has_the_same_addresses(
    engine: Callable[..., Any], tiny_heads: Path, backend: str
) -> None:
    """Batches of unlike sizes; see `test_persistent_buffers`."""
    prompts = [{"prompt_token_ids": [7 + i, 8, 9]} for i in range(2)]
    settings = {"attention_backend": backend, "speculative_config": spec(tiny_heads)}
    with stand_in_of(backend) as stand_in, engine(**settings) as llm:
        for batch in (prompts, prompts[:1]):
            greedy(llm, batch, 5)
    assert {len(call["lens"]) for call in stand_in.contexts} == {1, 2}
    for first in range(NUM_LAYERS):
        for name in stand_in.contexts[0]:
            calls = stand_in.contexts[first::NUM_LAYERS]
            assert len({call[name].data_ptr() for call in calls}) == 1, name
