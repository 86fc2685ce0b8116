"""What calibration predicts of dynamic trees is what the engine accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.command_line import DEMO_MODEL, MEDUSA_HEADS, REPO
from tests.integration.conftest import open_engine, spec_metrics
from tests.integration.seeing_heads import write_seeing_heads
from vllm_medusa.acceptance.ranks import Continuation, RankMeter
from vllm_medusa.acceptance.stored_heads import StoredHeads
from vllm_medusa.acceptance.texts import Answer, Text
from vllm_medusa.calibration.dynamic import guessed_text, tables_of
from vllm_medusa.draft.drafter import Drafter, DraftSettings
from vllm_medusa.draft.probability import probabilities_of_heads
from vllm_medusa.draft.replay import replay
from vllm_medusa.heads import HeadsCheckpoint, load_heads
from vllm_medusa.heads.selector import Selector
from vllm_medusa.target.frozen import load_target
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.limits import DynamicTrees

pytestmark = pytest.mark.engine

MAX_TOKENS = 128
SIZES = (4, 8, 16)
BOUNDS = DynamicTrees()


def pay_for_everything(llm: Any) -> None:
    """Let every node pay, whatever this machine's costs are."""

    def replace(worker: Any) -> None:
        worker.model_runner.tree_drafter._drafter._costs = None

    llm.collective_rpc(replace)


def generate(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    from vllm import SamplingParams

    given = [{"prompt_token_ids": tokens} for tokens in prompts]
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.generate(given, sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def measure(
    heads: HeadsCheckpoint, prompts: list[list[int]], answers: list[list[int]]
) -> list[Continuation]:
    """Every answer with the heads' guesses, as calibration has them."""
    target = load_target(str(DEMO_MODEL), revision=None, dtype=torch.float32)
    # Whole answers count: the metrics of the engine have all steps.
    texts = [
        Text(str(index), 0.0, prompt + answer, [Answer(len(prompt), len(prompt + answer), True)])
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    meter = RankMeter(target, StoredHeads(heads, target), num_guesses=32)
    return meter.measure(texts, lambda _: None)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("has_selector", "sizes"),
    [(False, SIZES), pytest.param(True, SIZES[1:2], marks=pytest.mark.slow)],
)
def test_engine_accepts_what_is_simulated(
    tmp_path: Path, has_selector: bool, sizes: tuple[int, ...]
) -> None:
    """Held-out prompts, greedy, float32, the probabilities that calibration wrote.

    Heads with a selector have ordinary ones.
    """
    from transformers import AutoTokenizer

    path = write_seeing_heads(tmp_path / "heads") if has_selector else MEDUSA_HEADS
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    lines = (REPO / "demo" / "prompts.jsonl").read_text().splitlines()[:16]
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    measured, answers = {}, []
    for size in sizes:
        spec = {"method": "medusa", "model": str(path), "tree": "dynamic"}
        spec |= {"max_nodes": size, "learn": False, "max_tree_requests": len(prompts)}
        with open_engine(DEMO_MODEL, speculative_config=spec) as llm:
            pay_for_everything(llm)
            answers = generate(llm, prompts)
            metrics = spec_metrics(llm)
        # The metrics' accepted tokens count some beyond the limit of tokens; the answers do not.
        # The prompt's own step emits the first token.
        emitted = sum(len(answer) - 1 for answer in answers)
        measured[size] = emitted / metrics["num_drafts"]
    heads = load_heads(path, target_vocab_size=4096)
    found = measure(heads, prompts, answers)
    tree = DraftTree.from_paths(json.loads((path / "medusa_tree.json").read_text())["paths"])
    probabilities = probabilities_of_heads(str(path), tree.depth, tree.top_k)
    texts = [guessed_text(i, tree, with_loops=True, all_guesses=has_selector) for i in found]
    tables = None
    if has_selector:
        selector = Selector.from_tensors(heads.tensors, torch.float32)
        tables = tables_of(selector, probabilities.superset)
    for size, accepted in measured.items():
        settings = DraftSettings(
            max_nodes=size,
            max_leaves=min(BOUNDS.max_paths, size),
            max_depth=min(BOUNDS.max_depth, size),
            learn=False,
        )
        drafter = Drafter(settings, probabilities, by_parent=has_selector)
        simulated = replay(texts, drafter, tables=tables).tokens_per_step
        print(f"{size} nodes: simulated {simulated:.3f}, engine {accepted:.3f}")
        assert abs(accepted / simulated - 1) < 0.03, size
