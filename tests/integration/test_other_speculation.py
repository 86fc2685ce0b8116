"""The speculation of vLLM's own that the benchmarks compare trees with, on the demo's drafters.

Each variant runs in a process of its own, with the plugin installed and not asked for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.command_line import REPO, run_python
from vllm_medusa.engines.engine import EngineProcess, Run, thread_environment
from vllm_medusa.engines.process import EngineProcessError

pytestmark = pytest.mark.engine

DEMO = REPO / "demo"
NUM_DRAFTS = 4
NUM_PROMPTS = 8
NEW_TOKENS = 48
# More than this many tokens a step, so that a drafter that has learnt nothing fails.
TRAINED = {"draft_model": 2.5, "eagle": 2.5, "eagle3": 2.2}
FOLDERS = {"draft_model": "draft-model", "eagle": "eagle", "eagle3": "eagle3"}


def prompts() -> list[str]:
    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:NUM_PROMPTS]]


def speculative_config(method: str) -> dict[str, Any]:
    config: dict[str, Any] = {"method": method, "num_speculative_tokens": NUM_DRAFTS}
    if method in FOLDERS:
        return {**config, "model": str(DEMO / FOLDERS[method])}
    if method == "ngram":
        return {**config, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
    return config


def generate(
    method: str | None, dtype: str = "float32", new_tokens: int = NEW_TOKENS, **options: Any
) -> Run:
    defaults = {
        "model": str(DEMO / "model"),
        "dtype": dtype,
        "enforce_eager": True,
        "max_model_len": 512,
        "block_size": 32,
        "num_gpu_blocks_override": 200,
        "seed": 0,
    }
    if method is not None:
        defaults["speculative_config"] = speculative_config(method)
    with EngineProcess({**defaults, **options}) as engine:
        engine.wait()
        return engine.run(prompts(), new_tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def baseline() -> Run:
    run = generate(None)
    assert run.num_drafts == 0
    return run


@pytest.fixture(scope="module")
def demo_scripts() -> Iterator[None]:
    """Make the scripts of the demo's training importable."""
    sys.path.insert(0, str(REPO / "examples" / "demo_model"))
    yield
    sys.path.remove(str(REPO / "examples" / "demo_model"))


def check(run: Run, baseline: Run, method: str) -> None:
    """Drafts are made, accepted as a trained drafter's are, and change no output."""
    assert run.token_ids == baseline.token_ids
    assert run.num_drafts > 0
    assert run.tokens_per_step > TRAINED.get(method, 1.2)
    assert len(run.step_ms) < len(baseline.step_ms)


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_drafts_are_accepted_and_change_nothing(method: str, baseline: Run) -> None:
    check(generate(method), baseline, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eagle3", "ngram"])
def test_further_methods(method: str, baseline: Run) -> None:
    check(generate(method), baseline, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*FOLDERS, "ngram"])
def test_bfloat16(method: str) -> None:
    run = generate(method, dtype="bfloat16")
    assert run.tokens_per_step > TRAINED.get(method, 1.2)


@pytest.mark.slow
@pytest.mark.parametrize("method", FOLDERS)
def test_compiled(method: str, baseline: Run) -> None:
    check(generate(method, enforce_eager=False), baseline, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_training_computes_what_vllm_runs(method: str, demo_scripts: None) -> None:
    """The unrolled drafts that the training learns from are accepted as often as vLLM's are."""
    run = generate(method)
    # vLLM counts what the last step accepted beyond the last token that was asked for.
    longer = generate(None, new_tokens=NEW_TOKENS + NUM_DRAFTS)
    assert simulate(method, longer.token_ids) == (run.num_drafts, run.num_accepted)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_draft_model", "train_eagle"])
def test_scripts_train_and_say_how(script: str, tmp_path: Path) -> None:
    few = ["--steps", "3", "--greedy-sequences", "8", "--real-sequences", "8", "--batch", "4"]
    command = [sys.executable, f"examples/demo_model/{script}.py", "--out", str(tmp_path), *few]
    subprocess.run(command, cwd=REPO, check=True)
    assert json.loads((tmp_path / "provenance.json").read_text())["positions_seen"] == 3 * 4 * 192
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_unavailable_methods_say_so() -> None:
    """What docs/other-speculation.md says does not run on a CPU."""
    with pytest.raises(EngineProcessError, match="pin_memory"):
        generate("ngram_gpu")


def simulate(method: str, continuations: list[list[int]]) -> tuple[int, int]:
    """Draft steps and accepted drafts of a greedy run, from a head's own unrolled drafts."""
    from eagle import load_head, target_states
    from target import load_model
    from transformers import AutoTokenizer

    target = load_model(DEMO / "model")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    head = load_head(DEMO / FOLDERS[method], target)
    embedding = target.get_input_embeddings()
    num_drafts = num_accepted = 0
    for prompt, continuation in zip(prompts(), continuations, strict=True):
        text = [*tokenizer(prompt)["input_ids"], *continuation]
        tokens = torch.tensor([text + [0] * NUM_DRAFTS])
        with torch.no_grad():
            states, _ = target_states(target, tokens, head.method)
            feature = head.first_feature(states[:, : len(text)])
            embeds, drafted, drafts = embedding(tokens), [], []
            for depth in range(NUM_DRAFTS):
                ahead = embeds[:, depth + 1 : depth + 1 + len(text)]
                output, feature = head(ahead, feature, depth, drafted)
                drafts.append((output @ embedding.weight.T).argmax(-1)[0].tolist())
        root = len(text) - len(continuation)
        last = root + NEW_TOKENS - 1
        while root < last:
            # The anchor is the position before the root; depth d guesses the token at root + 1 + d.
            right = [drafts[d][root - 1] == t for d, t in enumerate(text[root + 1 :][:NUM_DRAFTS])]
            accepted = [*right, False].index(False)
            num_drafts, num_accepted = num_drafts + 1, num_accepted + accepted
            root += accepted + 1
    return num_drafts, num_accepted


THREADS = """
import torch
from vllm import LLM, SamplingParams

llm = LLM({model!r}, enforce_eager=True, max_model_len=256, num_gpu_blocks_override=50,
          distributed_executor_backend="uni", speculative_config={config!r})
llm.generate(["def f(x):\\n    return x\\n\\ndef f(x):"], SamplingParams(max_tokens=8))
print("threads:", torch.get_num_threads())
"""


@pytest.mark.slow
def test_ngram_takes_no_thread_more() -> None:
    """Numba's threads are OpenMP's: without a bound the model would run on all cores."""
    script = THREADS.format(model=str(DEMO / "model"), config=speculative_config("ngram"))
    done = run_python(
        script, VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", **thread_environment(1)
    )
    assert "threads: 1" in done.stdout, done.stderr[-2000:]
