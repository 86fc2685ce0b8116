"""What speculation costs on text that no source can predict: random token ids.

    python examples/bench_random_text.py [--parameters 80e6] [--rounds 5] [--out results.json]

The demo model, inflated, has logits of nearly nothing: every token is as likely as any other.
Engines take turns: vLLM without the plugin, the plugin with its default trees, and the same
with requests that want no drafts (``max_nodes`` 0), whose steps are plain. Of each run the first
200 steps do not count: drafting is given up in them. Give it the machine alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from inflate import inflate
from transformers import AutoModelForCausalLM

from vllm_medusa.engines.engine import Run, start_engine, thread_environment
from vllm_medusa.reporting.provenance import cpu_name

DEMO = Path(__file__).resolve().parents[1] / "demo"
NUM_STEPS, SKIPPED_STEPS = 300, 200
PROMPT_LENGTH, VOCAB_SIZE = 64, 4000
RANDOM = {"temperature": 1.0, "ignore_eos": True}
NO_DRAFTS = {"extra_args": {"medusa": {"max_nodes": 0}}}


def main() -> None:
    """Measure and print."""
    args = arguments()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        small = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
        model = inflate(small, args.parameters)
        with torch.no_grad():
            model.model.norm.weight.mul_(1e-6)
        model.save_pretrained(folder)
        options = {
            "model": folder,
            "tokenizer": str(DEMO / "model"),
            "dtype": "float32",
            "max_model_len": 512,
            "enforce_eager": True,
        }
        speculative = {"method": "medusa", "model": str(DEMO / "heads")}
        environment = {**thread_environment(1), "VLLM_CPU_KVCACHE_SPACE": "1"}
        plain = start_engine(options, {**environment, "VLLM_PLUGINS": ""})
        engines = [stack.enter_context(plain)]
        medusa = start_engine({**options, "speculative_config": speculative}, environment)
        engines.append(stack.enter_context(medusa))
        sides: dict[str, tuple[Any, dict[str, Any]]] = {
            "no plugin": (engines[0], {}),
            "plugin": (engines[1], {}),
            "plugin, no drafts": (engines[1], NO_DRAFTS),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds):
            for name, (engine, more) in sides.items():
                prompts = random_prompts(args.batch_size, number)
                run = engine.run(prompts, NUM_STEPS, **RANDOM, **more)
                rates[name].append(tokens_per_s(run))
                print(f"round {number}  {name:18} {rates[name][-1]:8.2f} tokens/s", flush=True)
    report(rates, args)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=80e6)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def random_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of random token ids."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(PROMPT_LENGTH)] for _ in range(count)]


def tokens_per_s(run: Run) -> float:
    """Tokens a second behind the steps that do not count: those emitted over the steps' time."""
    num_left = sum(sum(times.emitted[SKIPPED_STEPS:]) for times in run.requests)
    return 1000 * num_left / sum(run.step_ms[SKIPPED_STEPS:])


def report(rates: dict[str, list[float]], args: argparse.Namespace) -> None:
    """Print each side's speed over that without the plugin, in the same rounds."""
    ratios = {
        name: [rate / base for rate, base in zip(values, rates["no plugin"], strict=True)]
        for name, values in rates.items()
    }
    for name, values in ratios.items():
        print(f"{name:18} {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")
    if args.out:
        settings = {name: str(value) for name, value in vars(args).items() if name != "out"}
        result = {
            "cpu": cpu_name(),
            "settings": settings,
            "tokens_per_s": rates,
            "over_no_plugin": ratios,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
