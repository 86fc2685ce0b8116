"""Tokens per step and tokens per second: trees, our chain, vLLM's own Medusa, no speculation.

    python examples/bench_speed.py                     # the demo model
    python examples/bench_speed.py --parameters 80e6   # inflated, so that weights cost something

Every variant is an engine in its own process, compiled as vLLM does by default. All take turns on
the same held-out prompts, one round per batch of prompts; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_steps import HEADS, MODEL, ROOT, convert_heads

from vllm_medusa.bench.process import EngineProcess, Run


def main() -> None:
    """Run all variants in turns and print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, help="inflate the demo model to so many")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12, help="batches of prompts (default: 12)")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens each (default: 96)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32], help="tree sizes")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--json", type=Path, help="also write every round's figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = inflated(Path(folder), args.parameters) if args.parameters else str(MODEL)
        engines = start(stack, args, model, convert_heads(Path(folder) / "heads"))
        runs = take_turns(engines, args)
    report(runs)
    if args.json:
        figures = {
            name: [
                {
                    "tokens_per_s": run.num_tokens / run.seconds,
                    "tokens_per_step": run.tokens_per_step,
                }
                for run in rounds
            ]
            for name, rounds in runs.items()
        }
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        text = json.dumps({"settings": settings, "rounds": figures}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")


def inflated(folder: Path, parameters: float) -> str:
    """Inflate the demo model; return the folder."""
    out = folder / "model"
    command = [sys.executable, str(Path(__file__).with_name("inflate.py")), str(MODEL), str(out)]
    subprocess.run([*command, "--parameters", str(parameters)], check=True)
    return str(out)


def start(
    stack: ExitStack, args: argparse.Namespace, model: str, built_in: str
) -> dict[str, EngineProcess]:
    """Start one engine after the other; compiling at once would take the machine's memory."""
    options = {
        "model": model,
        "dtype": args.dtype,
        "max_model_len": 1024,
        "enforce_eager": args.eager,
        "block_size": 32,
        "kv_cache_memory_bytes": 2**29,
        "enable_prefix_caching": False,
    }
    medusa: dict[str, Any] = {"method": "medusa", "model": str(HEADS)}
    variants: dict[str, tuple[dict[str, Any] | None, dict[str, str]]] = {
        "none": (None, {}),
        "vllm-chain": (
            {"method": "medusa", "model": built_in, "num_speculative_tokens": 4},
            {"VLLM_PLUGINS": ""},
        ),
        "chain": ({**medusa, "tree": "chain"}, {}),
        **{f"tree-{n}": ({**medusa, "num_speculative_tokens": n}, {}) for n in args.sizes},
    }
    engines = {}
    for name, (speculative, environment) in variants.items():
        print(f"starting {name} ...", file=sys.stderr, flush=True)
        engine = EngineProcess({**options, "speculative_config": speculative}, environment)
        engines[name] = stack.enter_context(engine)
        engine.wait()
    return engines


def take_turns(engines: dict[str, EngineProcess], args: argparse.Namespace) -> dict[str, list[Run]]:
    """Run every batch of prompts on every engine; the first one twice, to warm up."""
    lines = (ROOT / "demo" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    batches = [
        [prompts[(start + i) % len(prompts)] for i in range(args.batch_size)]
        for start in range(0, args.rounds * args.batch_size, args.batch_size)
    ]
    for engine in engines.values():
        engine.run(batches[0], args.max_tokens)
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for number, batch in enumerate(batches, start=1):
        print(f"round {number} of {len(batches)}", file=sys.stderr, flush=True)
        for name, engine in engines.items():
            runs[name].append(engine.run(batch, args.max_tokens))
    return runs


def report(runs: dict[str, list[Run]]) -> None:
    """Print a table of all variants."""
    print(
        f"{'':12}{'tokens/step':>12}{'step ms':>10}{'tokens/s':>10}{'over none':>11}  (quartiles)"
    )
    for name, rounds in runs.items():
        speed = [run.num_tokens / run.seconds for run in rounds]
        ratios = [
            run_speed / (base.num_tokens / base.seconds)
            for run_speed, base in zip(speed, runs["none"], strict=True)
        ]
        low, middle, high = statistics.quantiles(ratios, n=4)
        drafts = sum(run.num_drafts for run in rounds)
        accepted = sum(run.num_accepted for run in rounds)
        tokens_per_step = 1 + accepted / drafts if drafts else 1.0
        step_ms = statistics.median(statistics.median(run.step_ms) for run in rounds)
        print(
            f"{name:12}{tokens_per_step:12.2f}{step_ms:10.2f}{statistics.median(speed):10.0f}"
            f"{middle:11.2f}  ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()
