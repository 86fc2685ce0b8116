"""Heads with prefix attention on Model Runner V2: they read what whole texts give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.integration.command_line import DEMO_MODEL
from tests.integration.conftest import open_engine
from tests.integration.prefix_states import WholeTexts, states_kept, texts_of
from tests.integration.seeing_heads import WINDOW, write_seeing_heads
from tests.v2.accepted import accepted
from tests.v2.trees import dynamic, spec

pytestmark = pytest.mark.usefixtures("fast_attention")

NUM_PROMPTS, MAX_TOKENS = 4, 16


@pytest.mark.parametrize("kind", [spec, dynamic], ids=["static", "dynamic"])
def test_states(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    """Greedy and seeded, prompts in chunks, and more requests than places."""
    lines = (DEMO_MODEL.parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"][-150:] for line in lines[:NUM_PROMPTS]]
    params = [
        SamplingParams(temperature=temperature, seed=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        for temperature in (0, 0.8, 0, 0)
    ]
    options: dict[str, Any] = {
        "skip_tokenizer_init": False,
        "enable_prefix_caching": False,
        "max_model_len": 256,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 64,
    }
    with open_engine(DEMO_MODEL, **options) as llm:
        reference = texts_of(llm.generate(prompts, params, use_tqdm=False))
    path = write_seeing_heads(tmp_path / "heads", has_prefix=True)
    with (
        states_kept() as kept,
        accepted() as taken,
        open_engine(DEMO_MODEL, speculative_config=kind(path), **options) as llm,
    ):
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        texts = texts_of(llm.generate(prompts, params, use_tqdm=False))
    assert texts == reference
    assert len(taken.nodes) > 3
    assert len(kept) > NUM_PROMPTS * MAX_TOKENS / 6
    WholeTexts(path).check(kept, texts)


def test_place_of_an_ended_request_is_empty(tmp_path: Path) -> None:
    """What it held is not taken for the cached prefix of the next request at its place."""
    lines = (DEMO_MODEL.parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompt, other = (json.loads(line)["prompt"][-150:] for line in lines[:2])
    path = write_seeing_heads(tmp_path / "heads", has_prefix=True)
    options: dict[str, Any] = {
        "skip_tokenizer_init": False,
        "enable_prefix_caching": True,
        "max_model_len": 256,
        "max_num_seqs": 1,
    }

    def greedy(max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)

    with open_engine(DEMO_MODEL, speculative_config=spec(path), **options) as llm:
        [first] = llm.generate(prompt, greedy(2), use_tqdm=False)
        block_size = llm.llm_engine.vllm_config.cache_config.block_size
        cached = block_size * ((len(first.prompt_token_ids) - 1) // block_size)
        tokens = (9 * llm.get_tokenizer().encode(other))[: cached - 12]
        llm.generate({"prompt_token_ids": tokens}, greedy(8), use_tqdm=False)
        with states_kept() as kept:
            [output] = llm.generate(prompt, greedy(8), use_tqdm=False)
    assert output.num_cached_tokens == cached
    assert kept[0].position < cached + WINDOW - 5
    [text] = texts_of([output])
    wanted = WholeTexts(path).state_with(text, kept[0].position, range(cached, len(text)))
    assert (wanted - kept[0].state).abs().max() < 1e-3
