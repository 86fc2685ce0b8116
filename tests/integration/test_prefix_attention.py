"""Heads with prefix attention in an engine: lossless, and they read what whole texts give."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests.integration.command_line import DEMO_MODEL, MEDUSA_HEADS
from tests.integration.conftest import counters, open_engine, spec_metrics
from tests.integration.prefix_states import WholeTexts, states_kept, texts_of
from tests.integration.seeing_heads import WINDOW, seeing_tensors, write_seeing_heads
from tests.integration.sequential_heads import hydra_of_demo
from vllm_medusa.heads import load_heads
from vllm_medusa.heads.io.write import save_heads
from vllm_medusa.heads.prefix import PrefixAttention
from vllm_medusa.plugin.worker.prefix import PrefixContext, PrefixPlaces

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 6, 48
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)


def demo_engine(**options: Any) -> Any:
    defaults = {"skip_tokenizer_init": False, "enable_prefix_caching": False}
    return open_engine(DEMO_MODEL, **{**defaults, **options})


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    with (DEMO_MODEL.parent / "prompts.jsonl").open() as lines:
        return [json.loads(line)["prompt"] for line in itertools.islice(lines, NUM_PROMPTS)]


@pytest.fixture(scope="module")
def reference(prompts: list[str]) -> list[list[int]]:
    with demo_engine() as llm:
        return texts_of(llm.generate(prompts, GREEDY, use_tqdm=False))


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_seeing_heads(tmp_path_factory.mktemp("prefix") / "heads", has_prefix=True)


DYNAMIC = {"measure_costs": False}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # Prompts run in chunks, so that some rows of a batch have sampled nothing.
    "static": ({"tree": "cpu-16"}, {"max_num_batched_tokens": 100}),
    "dynamic": (DYNAMIC, {"max_num_batched_tokens": 100}),
    "costs measured": ({}, {"max_num_seqs": 4}),
    "preempted": (DYNAMIC, {"num_gpu_blocks_override": 40}),
}


@pytest.mark.parametrize("case", CASES)
def test_states(prompts: list[str], reference: list[list[int]], heads: Path, case: str) -> None:
    tree, options = CASES[case]
    spec = {"method": "medusa", "model": str(heads), **tree}
    with states_kept() as kept, demo_engine(speculative_config=spec, **options) as llm:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        # With measured costs forks need not pay on this machine.
        assert case == "costs measured" or counters(llm)["forks_accepted"] > NUM_PROMPTS
        assert spec_metrics(llm)["num_accepted_tokens"] > NUM_PROMPTS * MAX_TOKENS / 4
        preempted = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        assert (preempted > 0) == (case == "preempted")
    texts = texts_of(outputs)
    assert texts == reference
    assert len(kept) > NUM_PROMPTS * MAX_TOKENS / 6
    WholeTexts(heads).check(kept, texts)


def test_hydra(prompts: list[str], reference: list[list[int]], tmp_path: Path) -> None:
    """Hydra++: heads that run in turn read the same states."""
    plain = load_heads(MEDUSA_HEADS, target_vocab_size=4096)
    of_layer = {n: t for n, t in seeing_tensors(plain, 4096).items() if n.startswith("prefix.")}
    hydra = hydra_of_demo()
    spec = dataclasses.replace(hydra.spec, prefix_window=WINDOW)
    tensors = {name: tensor.to(spec.dtype) for name, tensor in of_layer.items()}
    path = tmp_path / "heads"
    save_heads(dataclasses.replace(hydra, spec=spec, tensors=hydra.tensors | tensors), path)
    config = {"method": "medusa", "model": str(path), "tree": "cpu-16"}
    with states_kept() as kept, demo_engine(speculative_config=config) as llm:
        texts = texts_of(llm.generate(prompts, GREEDY, use_tqdm=False))
        assert spec_metrics(llm)["num_accepted_tokens"] > NUM_PROMPTS * MAX_TOKENS / 6
    assert texts == reference
    WholeTexts(path).check(kept, texts)


def test_token_without_an_embedding() -> None:
    """Placeholders of images may lie outside the vocabulary; they do not end the engine."""
    layer = PrefixAttention(4, 4, 8, 1, 4, dtype=torch.float32)
    context = PrefixContext(layer, torch.nn.Embedding(10, 4).requires_grad_(False), 10, 1)
    rows = torch.zeros(3, dtype=torch.int64)
    context.keep(torch.randn(3, 4), torch.tensor([9, 10, -1]), rows, torch.arange(3))
    where = PrefixPlaces(rows[:1], torch.tensor([2]))
    assert context.at(torch.randn(1, 4), rows[:1], where).isfinite().all()


def test_cached_prefix_is_missing(prompts: list[str], heads: Path) -> None:
    """The engine has not computed it; the heads read the rest."""
    spec = {"method": "medusa", "model": str(heads), "tree": "cpu-16"}
    prompt = max(prompts, key=len)
    with demo_engine(speculative_config=spec, enable_prefix_caching=True) as llm:
        llm.generate(prompt, GREEDY, use_tqdm=False)
        with states_kept() as kept:
            [output] = llm.generate(prompt, GREEDY, use_tqdm=False)
    [text], cached = texts_of([output]), output.num_cached_tokens
    assert 32 <= cached <= kept[0].position
    whole, position = WholeTexts(heads), kept[0].position
    wanted = whole.state_with(text, position, range(cached, len(text)))
    assert (wanted - kept[0].state).abs().max() < 1e-3
    assert (whole.states(text)[0][position] - wanted).abs().max() > 0.01


def test_place_of_an_ended_request_is_empty(prompts: list[str], heads: Path) -> None:
    """What it held is not taken for the cached prefix of the next request at its place."""
    spec = {"method": "medusa", "model": str(heads), "tree": "cpu-16"}
    prompt, other = sorted(prompts, key=len)[-1:-3:-1]
    options = {"enable_prefix_caching": True, "max_num_seqs": 1}
    with demo_engine(speculative_config=spec, **options) as llm:
        [first] = llm.generate(prompt, GREEDY, use_tqdm=False)
        cached = 32 * (len(first.prompt_token_ids) // 32)
        tokens = (2 * llm.get_tokenizer().encode(other))[: cached - 12]
        short = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        llm.generate({"prompt_token_ids": tokens}, short, use_tqdm=False)
        with states_kept() as kept:
            [output] = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert len(tokens) == cached - 12
    assert output.num_cached_tokens == cached
    assert kept[0].position < cached + WINDOW - 5
    [text] = texts_of([output])
    wanted = WholeTexts(heads).state_with(text, kept[0].position, range(cached, len(text)))
    assert (wanted - kept[0].state).abs().max() < 1e-3


def test_request_without_drafts_is_kept_too(prompts: list[str], heads: Path) -> None:
    """Beside one that drafts; and heads do not run for it."""
    spec = {"method": "medusa", "model": str(heads), "tree": "cpu-16"}
    extra: list[Mapping[str, Any] | None] = [{"medusa": {"max_nodes": 0}}, None]
    params = [SamplingParams(temperature=0, max_tokens=24, extra_args=e) for e in extra]
    with states_kept() as kept, demo_engine(speculative_config=spec) as llm:
        texts = texts_of(llm.generate(prompts[:2], params, use_tqdm=False))
    WholeTexts(heads).check(kept, texts)
