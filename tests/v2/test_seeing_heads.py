"""Heads that see the last token and have a selector, on Model Runner V2: static trees only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.integration.conftest import greedy, spec_metrics
from tests.v2.trees import spec
from vllm_medusa.errors import UserError
from vllm_medusa.heads import load_heads
from vllm_medusa.heads.io.write import save_heads

pytestmark = pytest.mark.usefixtures("fast_attention")

RANK = 4


@pytest.fixture(scope="module")
def seeing_heads(tiny_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = load_heads(tiny_heads, target_vocab_size=tiny.VOCAB_SIZE)
    generator = torch.Generator().manual_seed(0)
    num_heads, size = heads.spec.num_heads, heads.spec.hidden_size
    shapes = {
        "root.weight": (num_heads, size, size),
        "selector.parent": (tiny.VOCAB_SIZE, RANK),
        "selector.child": (tiny.VOCAB_SIZE, RANK),
        "selector.depth": (num_heads, RANK),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    settings = dataclasses.replace(heads.spec, root_size=size, selector_rank=RANK)
    path = tmp_path_factory.mktemp("seeing") / "heads"
    save_heads(dataclasses.replace(heads, spec=settings, tensors=heads.tensors | tensors), path)
    return path


def test_text_of_no_speculation(
    engine: Callable[..., Any], seeing_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    with engine(speculative_config=spec(seeing_heads)) as llm:
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        assert greedy(llm, prompts[:2], 8) == [text[:8] for text in reference[:2]]
        assert spec_metrics(llm)["num_draft_tokens"] > 0


def test_dynamic_trees_are_refused(engine: Callable[..., Any], seeing_heads: Path) -> None:
    settings = {"method": "medusa", "model": str(seeing_heads), "tree": "dynamic"}
    with (
        pytest.raises(
            UserError, match="which heads with a selector do not have on Model Runner V2"
        ),
        engine(speculative_config=settings),
    ):
        pass
