"""Where a text ends: stop strings, stop tokens and lengths that fall inside an accepted path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.integration.command_line import DEMO_HEADS, DEMO_MODEL
from tests.integration.conftest import counters, open_engine, random_prompts, token_ids

pytestmark = pytest.mark.engine


def test_stops_inside_an_accepted_path() -> None:
    lines = (DEMO_MODEL.parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:8]]
    stops: list[dict[str, Any]] = [
        {"stop": ["self", "return"]},
        {"stop": ["\n\n"], "include_stop_str_in_output": True},
        {"stop": ["):"], "min_tokens": 20},
        {"max_tokens": 7},
        {"max_tokens": 1},
        {"stop_token_ids": list(range(200, 300))},
        {"stop": ["e", "x"]},
        {"ignore_eos": True},
    ]
    params = [SamplingParams(**{"temperature": 0, "max_tokens": 64, **stop}) for stop in stops]
    options = {"skip_tokenizer_init": False, "max_model_len": 1024}
    with open_engine(DEMO_MODEL, **options) as llm:
        reference = llm.generate(prompts, params, use_tqdm=False)
    spec = {"method": "medusa", "model": str(DEMO_HEADS), "tree": "cpu-32"}
    with open_engine(DEMO_MODEL, speculative_config=spec, **options) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert counters(llm)["forks_accepted"] > 10
    for expected, output in zip(reference, outputs, strict=True):
        assert output.outputs[0].text == expected.outputs[0].text
        assert output.outputs[0].finish_reason == expected.outputs[0].finish_reason
        assert output.outputs[0].stop_reason == expected.outputs[0].stop_reason
    assert token_ids(outputs) == token_ids(reference)
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop", "length"}


def test_seeds_with_prompts_in_chunks(
    engine: Callable[..., Any], tiny_heads: Path, use_oracle: Callable[..., Any]
) -> None:
    """A prompt's chunks take no draws: the text is that of the prompt in one piece."""
    prompts = random_prompts(5, seed=21, longest=200)
    params = [
        SamplingParams(temperature=0.9, seed=seed, max_tokens=40, ignore_eos=True, detokenize=False)
        for seed in range(5)
    ]
    with engine(max_num_batched_tokens=2048) as llm:
        reference = token_ids(llm.generate(prompts, params, use_tqdm=False))
    use_oracle(prompts, reference)
    spec = {"method": "medusa", "model": str(tiny_heads), "tree": "cpu-8"}
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 4}
    assert max(len(prompt["prompt_token_ids"]) for prompt in prompts) > 4 * 32
    with engine(speculative_config=spec, **options) as llm:
        assert token_ids(llm.generate(prompts, params, use_tqdm=False)) == reference
        assert counters(llm)["forks_accepted"] > 10
