"""Generate text with a draft tree and without, side by side: the same text, in fewer steps.

Run it with `make demo`. Two engines are started, one with the demo model's Medusa heads and one
without; they take turns, so that both see the machine in the same state.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm_medusa.engines.engine import EngineProcess, Run

DEMO = Path(__file__).resolve().parent.parent / "demo"
#: The model is too small for more.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def main() -> None:
    """Start both engines, run them in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=3, help="how many prompts (default: 3)")
    parser.add_argument("--max-tokens", type=int, default=96, help="tokens each (default: 96)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument(
        "--tree", help="any tree of the README (default: the heads' best of 16 nodes)"
    )
    args = parser.parse_args()

    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[: args.prompts]]
    options = {
        "model": str(DEMO / "model"),
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 2**29,
        # Off, so that every round runs the prompts anew.
        "enable_prefix_caching": False,
    }
    # Not `auto`: for a model this small the heads' tree schedule has next to no tree.
    tree = {"num_speculative_tokens": 16} if args.tree is None else {"tree": args.tree}
    medusa = {"method": "medusa", "model": str(DEMO / "heads"), **tree}
    print("Starting two engines: without speculation, and with a draft tree ...", flush=True)
    with (
        EngineProcess(options, ONE_THREAD) as plain,
        EngineProcess({**options, "speculative_config": medusa}, ONE_THREAD) as drafting,
    ):
        plain.wait()
        drafting.wait()
        compare(plain, drafting, prompts, args.max_tokens, args.rounds)


def compare(
    plain: EngineProcess, tree: EngineProcess, prompts: list[str], max_tokens: int, rounds: int
) -> None:
    """Run both engines in turns and print what they gave."""
    for engine in (plain, tree):
        engine.run(prompts[:1], 8)
    pairs = [(plain.run(prompts, max_tokens), tree.run(prompts, max_tokens)) for _ in range(rounds)]
    without, with_tree = pairs[0]
    for prompt, text in zip(prompts, with_tree.texts, strict=True):
        print(f"\n{'=' * 20} prompt, ending in\n{prompt[-200:]}")
        print(f"{'-' * 20} generated with the tree\n{text}")
    same = with_tree.token_ids == without.token_ids
    print(f"\nThe two texts are {'identical, token for token' if same else 'DIFFERENT'}.\n")
    print(f"{'':24}{'steps':>8}{'tokens/step':>14}{'tokens/s':>12}")
    for name, runs in (
        ("without speculation", [pair[0] for pair in pairs]),
        ("with a draft tree", [pair[1] for pair in pairs]),
    ):
        print(
            f"{name:24}{len(runs[0].step_ms):>8}{runs[0].tokens_per_step:>14.2f}{speed(runs):>12.0f}"
        )
    if not same:
        raise SystemExit(1)


def speed(runs: list[Run]) -> float:
    """Tokens per second, the median of the rounds."""
    return sorted(run.num_tokens / run.seconds for run in runs)[len(runs) // 2]


if __name__ == "__main__":
    main()
