"""Dynamic trees: each request's and step's own, chosen on the device; text of no speculation."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams

from tests import tiny
from tests.integration.conftest import greedy, spec_metrics, token_ids
from tests.oracles import best_first as slow
from tests.v2.conftest import MAX_TOKENS
from tests.v2.oracle import Oracle

pytestmark = pytest.mark.usefixtures("fast_attention")

Engine = Callable[..., Any]
NUM_NODES = 12


class Guesser:
    """Stands in for the heads: the right token has a random rank, likelihoods are random.

    Attributes:
        shapes: parents of all trees that were drafted.
        accepted_nodes: nodes that any step accepted.

    """

    def __init__(self, prompts: list[Any], futures: list[list[int]]) -> None:
        self._oracle = Oracle()
        self._oracle.expect(prompts, futures)
        self._rng = random.Random(0)
        self.shapes: set[tuple[int, ...]] = set()
        self.accepted_nodes: set[int] = set()

    def guess(self, req_states: Any, index: list[int], shape: Any) -> tuple[Any, Any]:
        num_heads, _, num_guesses = shape
        log_probs = torch.zeros(num_heads, len(index), num_guesses)
        tokens = torch.zeros(num_heads, len(index), num_guesses, dtype=torch.int64)
        for req, state in enumerate(index):
            text = req_states.all_token_ids.gpu[state][: int(req_states.total_len.gpu[state])]
            future = self._oracle._future(text.tolist())
            for head in range(num_heads):
                row = self._rng.sample(range(tiny.VOCAB_SIZE - 1), num_guesses)
                weights = sorted((self._rng.random() ** 4 for _ in row), reverse=True)
                if head < len(future):
                    if future[head] in row:
                        row.remove(future[head])
                    row.insert(self._rng.choice([0, 0, 1, 2]), future[head])
                tokens[head, req] = torch.tensor(row[:num_guesses])
                log_probs[head, req] = (torch.tensor(weights) / sum(weights)).log()
        return log_probs, tokens


@pytest.fixture
def guessing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Guesser]:
    """Have engines draft with a guesser's guesses, each tree compared with the slow oracle's."""
    from vllm_medusa.plugin.worker.v2 import sampler, speculator

    def install(prompts: list[Any], futures: list[list[int]]) -> Guesser:
        guesser = Guesser(prompts, futures)
        original_init = speculator.TreeSpeculator.__init__
        original = speculator.TreeSpeculator.propose
        original_call = sampler.TreeSampler.__call__

        def init(self: Any, vllm_config: Any, device: Any, req_states: Any) -> None:
            original_init(self, vllm_config, device, req_states)
            self.req_states = req_states

        def propose(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dummy_run"):
                return original(self, input_batch, *args, **kwargs)
            index = input_batch.idx_mapping.tolist()
            tree = self.proposer.config.tree
            guesses = guesser.guess(self.req_states, index, (tree.depth, len(index), tree.top_k))
            self.proposer.probable_guesses = lambda *_: guesses
            tokens = original(self, input_batch, *args, **kwargs)
            check(self, index, tokens, *guesses)
            return tokens

        def check(self: Any, index: list[int], tokens: Any, log_probs: Any, guesses: Any) -> None:
            ranks = self._best_first._paths.ranks.T.tolist()
            paths = [tuple(rank for rank in path if rank >= 0) for path in ranks]
            for req, state in enumerate(index):
                grown = slow.grow(paths, log_probs[:, req].numpy(), NUM_NODES)
                wanted = slow.as_nodes([p for p, _ in grown], guesses[:, req].numpy(), NUM_NODES)
                parents = self.states.parents[state].tolist()
                assert (parents, tokens[req].tolist()) == wanted
                guesser.shapes.add(tuple(parents))

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original_call(self, *args, **kwargs)
            for path, length in zip(self.acceptance.path, self.acceptance.length, strict=True):
                guesser.accepted_nodes |= set(path[: int(length) + 1].tolist())
            return output

        monkeypatch.setattr(speculator.TreeSpeculator, "__init__", init)
        monkeypatch.setattr(speculator.TreeSpeculator, "propose", propose)
        monkeypatch.setattr(sampler.TreeSampler, "__call__", call)
        return guesser

    return install


def dynamic(heads: Path, **options: Any) -> dict[str, Any]:
    settings = {"tree": "dynamic", "max_nodes": NUM_NODES, **options}
    return {"method": "medusa", "model": str(heads), **settings}


@pytest.mark.parametrize("temperature", [0.0, 0.8], ids=["greedy", "seeded"])
def test_text_of_no_speculation(
    engine: Engine,
    tiny_heads: Path,
    prompts: list[Any],
    guessing: Callable[..., Guesser],
    temperature: float,
) -> None:
    params = [
        SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            detokenize=False,
        )
        for seed in range(4)
    ]
    prompts = prompts[:4]
    with engine() as llm:
        reference = token_ids(llm.generate(prompts, params, use_tqdm=False))
    guesser = guessing(prompts, reference)
    with engine(speculative_config=dynamic(tiny_heads)) as llm:
        config = llm.llm_engine.vllm_config
        assert config.use_v2_model_runner
        assert config.scheduler_config.async_scheduling
        assert token_ids(llm.generate(prompts, params, use_tqdm=False)) == reference
        metrics = spec_metrics(llm)
    assert metrics["num_accepted_tokens"] > 25
    assert len(guesser.shapes) > 10
    assert len(guesser.accepted_nodes) > 5


def test_real_heads(
    engine: Engine, tiny_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    with engine(speculative_config=dynamic(tiny_heads, max_depth=2)) as llm:
        assert greedy(llm, prompts[:2], 8) == [text[:8] for text in reference[:2]]
        assert spec_metrics(llm)["num_draft_tokens"] > 0
