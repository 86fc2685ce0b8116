"""Engines for the integration tests: real vLLM, in this process, on a tiny model."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def models_are_looked_at_here() -> None:
    """vLLM looks at each architecture in a process of its own, lest a GPU be touched here."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_heads(tmp_path_factory.mktemp("tiny-heads"))


@contextmanager
def open_engine(model: Path, **options: Any) -> Iterator[Any]:
    """An in-process ``LLM`` in float32 with a small KV cache; closed at the end."""
    from vllm import LLM

    defaults: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "num_gpu_blocks_override": 1200,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        "seed": 0,
    }
    llm = LLM(model=str(model), **{**defaults, **options})
    try:
        if _drafting.make is not None and "speculative_config" in options:
            draft_with(llm, _drafting.make)
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        freeze_imports()


@cache
def freeze_imports() -> None:
    """Keep what is imported out of garbage collection.

    vLLM collects seven times for each engine and we do once; going through what it imported is
    most of the time that an engine takes to open and to close.
    """
    gc.freeze()
    # vLLM freezes what an engine holds and unfreezes all: the engine would stay or the imports not.
    gc.freeze = gc.unfreeze = lambda: None


@pytest.fixture
def engine(tiny_model: Path) -> Callable[..., Any]:
    """``with engine(**LLM options) as llm``, on the tiny model."""
    return lambda **options: open_engine(tiny_model, **options)


def random_prompts(count: int, seed: int = 0, longest: int = 70) -> list[dict[str, list[int]]]:
    """Prompts of random tokens and lengths."""
    rng = random.Random(seed)
    return [
        {
            "prompt_token_ids": [
                rng.randrange(tiny.VOCAB_SIZE - 1) for _ in range(rng.randint(3, longest))
            ]
        }
        for _ in range(count)
    ]


def greedy(llm: Any, prompts: list[Any], max_tokens: int = 60, **params: Any) -> list[list[int]]:
    """Greedy continuations of ``prompts``, as token ids."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **params
    )
    return token_ids(llm.generate(prompts, sampling, use_tqdm=False))


def token_ids(outputs: list[Any]) -> list[list[int]]:
    """Token ids of the first completion of each output."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def counters(llm: Any) -> dict[str, int]:
    """The plugin's counters of the first worker."""
    return llm.collective_rpc("medusa_counters")[0]


def spec_metrics(llm: Any) -> dict[str, Any]:
    """vLLM's own speculative-decoding metrics."""
    return {
        metric.name.removeprefix("vllm:spec_decode_"): getattr(
            metric, "value", getattr(metric, "values", None)
        )
        for metric in llm.get_metrics()
        if "spec_decode" in metric.name
    }


def make_oracle(prompts: list[Any], futures: list[list[int]], seed: int = 0) -> tiny.Oracle:
    """An oracle that knows how the target continues the prompts."""
    pairs = zip(prompts, futures, strict=True)
    return tiny.Oracle({tuple(p["prompt_token_ids"]): future for p, future in pairs}, seed)


@pytest.fixture
def use_oracle(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tiny.Oracle]:
    """Have the engines that are opened from now on draft with an oracle."""

    def install(prompts: list[Any], futures: list[list[int]], seed: int = 0) -> tiny.Oracle:
        oracle = make_oracle(prompts, futures, seed)
        monkeypatch.setattr(_drafting, "make", lambda runner: tiny.OracleDrafter(oracle, runner))
        return oracle

    return install


class _Drafting:
    """What drafts in the engines of this process in place of their own drafter."""

    make: Callable[[Any], Any] | None = None


_drafting = _Drafting()


def draft_with(llm: Any, make: Callable[[Any], Any]) -> None:
    """Replace the drafter of an engine of this process by ``make(its runner)``."""

    def replace(worker: Any) -> None:
        worker.model_runner.tree_drafter = make(worker.model_runner)

    llm.collective_rpc(replace)
