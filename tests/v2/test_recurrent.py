"""Recurrent heads on Model Runner V2: lossless, and each draft is what whole texts give."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.integration.command_line import DEMO_MODEL, RECURRENT_HEADS
from tests.integration.conftest import open_engine
from tests.integration.prefix_states import texts_of
from tests.integration.recurrent_drafts import SlowDrafts, drafts_kept
from tests.v2.accepted import accepted
from tests.v2.trees import NUM_HEADS, dynamic, spec
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.named import default_paths

pytestmark = pytest.mark.usefixtures("fast_attention")

NUM_PROMPTS, MAX_TOKENS, NUM_NODES = 4, 16, 8


def static(heads: Path) -> dict[str, Any]:
    return spec(heads, NUM_NODES)


@pytest.mark.parametrize("kind", [static, dynamic])
def test_lossless(kind: Callable[[Path], Any]) -> None:
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
    with (
        drafts_kept() as kept,
        accepted() as taken,
        open_engine(DEMO_MODEL, speculative_config=kind(RECURRENT_HEADS), **options) as llm,
    ):
        assert llm.llm_engine.vllm_config.use_v2_model_runner
        texts = texts_of(llm.generate(prompts, params, use_tqdm=False))
    assert texts == reference
    assert taken.num_forks > 0
    if kind is static:
        assert len(kept) > NUM_PROMPTS * MAX_TOKENS / 6
        tree = DraftTree.from_paths(default_paths(NUM_HEADS, NUM_NODES))
        SlowDrafts(RECURRENT_HEADS).check(kept[::2], texts, tree.paths)
