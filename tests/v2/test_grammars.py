"""Grammars on Model Runner V2: each node's mask follows its own path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.integration.conftest import open_engine, spec_metrics, token_ids

pytestmark = pytest.mark.usefixtures("fast_attention")

DEMO = Path(__file__).resolve().parents[2] / "demo"
REGEX = r"(def|class) [a-z_]{3,12}\((self|cls)(, [a-z]{2,6}){0,3}\):"
CHOICES = ["return self._get_value", "return self._get_name", "return None"]
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": False, "max_model_len": 256, "max_num_seqs": 4}


def params() -> list[SamplingParams]:
    """Two grammars, one of them sampled, beside a request without."""
    constraints: list[dict[str, Any]] = [{"regex": REGEX}, {"choice": CHOICES}, {"regex": REGEX}]
    structured = [
        SamplingParams(
            temperature=temperature,
            seed=1,
            max_tokens=16,
            structured_outputs=StructuredOutputsParams(**constraint),
        )
        for temperature, constraint in zip((0, 0, 0.8), constraints, strict=True)
    ]
    return [*structured, SamplingParams(temperature=0, max_tokens=16)]


def prompts() -> list[Any]:
    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"][-120:] for line in lines[: len(params())]]


@pytest.fixture(scope="module")
def reference() -> Any:
    with open_engine(DEMO / "model", **OPTIONS) as llm:
        return llm.generate(prompts(), params(), use_tqdm=False)


def test_grammars(reference: Any) -> None:
    spec = {"method": "medusa", "model": str(DEMO / "heads"), "tree": "cpu-8"}
    with open_engine(DEMO / "model", speculative_config=spec, **OPTIONS) as llm:
        outputs = llm.generate(prompts(), params(), use_tqdm=False)
        metrics = spec_metrics(llm)
    assert token_ids(outputs) == token_ids(reference)
    assert metrics["num_accepted_tokens"] > 8


def test_chain_for_grammars_behind_reasoning(reference: Any, monkeypatch: Any) -> None:
    """Where vLLM walks the drafts as a chain, the trees are one."""
    from vllm_medusa.plugin.core import structured_output
    from vllm_medusa.plugin.worker.v2 import runner

    for module in (structured_output, runner):
        monkeypatch.setattr(module, "masks_trees", lambda _: False)
    spec = {"method": "medusa", "model": str(DEMO / "heads"), "tree": "cpu-8"}
    with open_engine(DEMO / "model", speculative_config=spec, **OPTIONS) as llm:
        outputs = llm.generate(prompts(), params(), use_tqdm=False)
        metrics = spec_metrics(llm)
    assert token_ids(outputs) == token_ids(reference)
    assert metrics["num_accepted_tokens"] > 4
