"""Recurrent heads in an engine: lossless, and each draft is what whole texts give."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from vllm import SamplingParams

from tests.integration.command_line import DEMO_MODEL, RECURRENT_HEADS
from tests.integration.conftest import counters, open_engine, spec_metrics
from tests.integration.prefix_states import texts_of
from tests.integration.recurrent_drafts import SlowDrafts, drafts_kept
from vllm_medusa.tree.draft_tree import DraftTree

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 6, 48
PATHS = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0), (0, 0, 0, 0)]
TREE = {"tree": [list(path) for path in PATHS]}
DYNAMIC = {"measure_costs": False}


def demo_engine(**options: Any) -> Any:
    defaults = {"skip_tokenizer_init": False, "enable_prefix_caching": False}
    return open_engine(DEMO_MODEL, **{**defaults, **options})


def with_heads(**tree: Any) -> dict[str, Any]:
    return {"method": "medusa", "model": str(RECURRENT_HEADS), **tree}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    with (DEMO_MODEL.parent / "prompts.jsonl").open() as lines:
        return [json.loads(line)["prompt"] for line in itertools.islice(lines, NUM_PROMPTS)]


def params() -> list[SamplingParams]:
    """A third of the texts sampled with a seed, the others greedy."""
    return [
        SamplingParams(
            temperature=0.8 * (i % 3 == 1), seed=i, max_tokens=MAX_TOKENS, ignore_eos=True
        )
        for i in range(NUM_PROMPTS)
    ]


@pytest.fixture(scope="module")
def reference(prompts: list[str]) -> list[list[int]]:
    with demo_engine() as llm:
        return texts_of(llm.generate(prompts, params(), use_tqdm=False))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Prompts run in chunks, so that some rows of a batch have sampled nothing.
    "static": (TREE, {"max_num_batched_tokens": 100}),
    "dynamic, preempted": (DYNAMIC, {"num_gpu_blocks_override": 40}),
    "dynamic": (DYNAMIC, {"max_num_batched_tokens": 100}),
    "dynamic, heads alone": ({**DYNAMIC, "sources": ["heads"]}, {}),
    "costs measured": ({}, {"max_num_seqs": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_lossless(prompts: list[str], reference: list[list[int]], case: str) -> None:
    tree, options = CASES[case]
    with (
        drafts_kept() as kept,
        demo_engine(speculative_config=with_heads(**tree), **options) as llm,
    ):
        outputs = llm.generate(prompts, params(), use_tqdm=False)
        # With measured costs forks need not pay on this machine.
        assert case == "costs measured" or counters(llm)["forks_accepted"] > NUM_PROMPTS
        assert spec_metrics(llm)["num_accepted_tokens"] > NUM_PROMPTS * MAX_TOKENS / 3
        preempted = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        assert (preempted > 0) == ("preempted" in case)
    texts = texts_of(outputs)
    assert texts == reference
    if tree is TREE:
        assert len(kept) > NUM_PROMPTS * MAX_TOKENS / 6
        tree_of_test = DraftTree.from_paths(TREE["tree"])
        SlowDrafts(RECURRENT_HEADS).check(kept[::7], texts, tree_of_test.paths)


def test_cached_prefix_is_missing(prompts: list[str]) -> None:
    """The engine has not computed it; the heads read the rest."""
    prompt = max(prompts, key=len)
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    config = with_heads(**TREE)
    with demo_engine(speculative_config=config, enable_prefix_caching=True) as llm:
        llm.generate(prompt, greedy, use_tqdm=False)
        with drafts_kept() as kept:
            [output] = llm.generate(prompt, greedy, use_tqdm=False)
    [text], cached = texts_of([output]), output.num_cached_tokens
    assert 32 <= cached <= kept[0].position
    paths, slow = DraftTree.from_paths(TREE["tree"]).paths, SlowDrafts(RECURRENT_HEADS)
    slow.check(kept[:4], [text], paths, first_known=cached)
    with pytest.raises(AssertionError):
        slow.check(kept[:4], [text], paths)
