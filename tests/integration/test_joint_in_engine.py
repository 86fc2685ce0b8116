"""A model that was trained together with its heads serves with nothing but its own directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.integration.conftest import greedy, open_engine, spec_metrics
from tests.training import counting_rows, make_settings, write_rows
from vllm_medusa.training.run import train

pytestmark = pytest.mark.engine


def without_heads(merged: Path, directory: Path) -> Path:
    """The same model as vLLM itself can load it, which stops at tensors that it does not know."""
    directory.mkdir()
    shutil.copy(merged / "config.json", directory)
    tensors = load_file(merged / "model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("medusa_head.")}
    assert len(own) < len(tensors)
    save_file(own, directory / "model.safetensors", {"format": "pt"})
    return directory


PROMPTS = [{"prompt_token_ids": list(range(first, first + 5))} for first in (3, 11, 30)]


@pytest.mark.parametrize(
    "kind",
    [
        # All weights learn to count: their text, and so what the heads guess, becomes another one.
        {"joint": "full", "backbone_loss": "ce", "backbone_lr": 5e-3, "heads_warmup": 0.0},
        {"joint": "lora", "backbone_loss": "ce", "backbone_lr": 2e-2, "heads_warmup": 0.0},
    ],
    ids=lambda kind: kind["joint"],
)
def test_merged_model_serves(tiny_model: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    settings = make_settings(
        model=str(tiny_model),
        data=str(write_rows(tmp_path / "data", counting_rows(200))),
        loss="ce",
        heads_weight=0.5,
        steps=80,
        eval_every=40,
        lr=1e-2,
        batch_tokens=600,
        **kind,
    )
    report = train(settings, tmp_path / "model")
    before, after = (report["joint"][when]["target"] for when in ("before", "after"))
    assert after["perplexity"] < before["perplexity"] / 2
    with open_engine(tiny_model) as llm:
        original = greedy(llm, PROMPTS, 30)
    with open_engine(without_heads(tmp_path / "model", tmp_path / "alone")) as llm:
        expected = greedy(llm, PROMPTS, 30)
    assert expected != original
    for speculative in ("medusa", {"method": "medusa", "tree": "cpu-8"}):
        with open_engine(tmp_path / "model", speculative_config=speculative) as llm:
            assert greedy(llm, PROMPTS, 30) == expected
            metrics = spec_metrics(llm)
    # Of the static tree; a machine may find that no tree pays for the dynamic ones.
    assert metrics["num_accepted_tokens"] > 20
