"""What a second engine adds: one and two engines of a Ray cluster take turns at the same prompts.

Each engine has one thread. The prompts go in small lots to whichever engine is free, first with one
engine, then with both, round after round, so that a machine whose speed drifts does not decide.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from inflate import inflate
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_medusa.engines.engine import EngineProcess, thread_environment
from vllm_medusa.engines.ray_cluster import LOCAL, ray_cluster
from vllm_medusa.files import write_json
from vllm_medusa.reporting.provenance import provenance

DEMO = Path(__file__).resolve().parents[1] / "demo"
LOT = 4


def main() -> None:
    """Start two engines, measure in turns, print and write the figures."""
    args = arguments()
    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[: args.prompts]]
    lots = [prompts[start : start + LOT] for start in range(0, len(prompts), LOT)]
    with tempfile.TemporaryDirectory() as folder, ray_cluster(LOCAL, 2) as ray:
        write_model(Path(folder), args.parameters)
        actor = ray.remote(num_cpus=1)(Engine)
        engines = [actor.remote(folder, args.max_tokens, index) for index in range(2)]
        ray.get([engine.run.remote(lots[0]) for engine in engines])
        rounds = [
            {count: measure(ray, engines[:count], lots) for count in (1, 2)}
            for _ in range(args.rounds)
        ]
        ray.get([engine.close.remote() for engine in engines])
    report(rounds, args.out)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=float, default=30e6, help="of the model (30e6)")
    parser.add_argument("--prompts", type=int, default=32, help="how many (32)")
    parser.add_argument("--max-tokens", type=int, default=48, help="of each answer (48)")
    parser.add_argument("--rounds", type=int, default=3, help="timed (3)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser.parse_args()


def write_model(out: Path, num_parameters: float) -> None:
    """Write the demo model, inflated: as it is, tokens cost less than sending them."""
    small = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype="float32")
    inflate(small, num_parameters).save_pretrained(out)
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(out)


class Engine:
    """A Ray actor with an engine that drafts trees, on a core of its own."""

    def __init__(self, model: str, max_tokens: int, index: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})
        self._max_tokens = max_tokens
        options = {
            "model": model,
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": LOT,
            "speculative_config": {"method": "medusa", "model": str(DEMO / "heads")},
        }
        self._engine = EngineProcess(options, thread_environment(1))
        self._engine.wait()

    def run(self, prompts: list[str]) -> int:
        """Answer a lot; return the number of tokens."""
        self._engine.reset_prefix_cache()
        return self._engine.run(prompts, self._max_tokens, ignore_eos=True).num_tokens

    def close(self) -> None:
        """End the engine's process."""
        self._engine.close()


def measure(ray: Any, engines: list[Any], lots: list[list[str]]) -> float:
    """Tokens per second of all lots on these engines."""
    from ray.util import ActorPool

    begin = time.monotonic()
    pool = ActorPool(engines)
    num_tokens = sum(pool.map_unordered(lambda engine, lot: engine.run.remote(lot), lots))
    return num_tokens / (time.monotonic() - begin)


def report(rounds: list[dict[int, float]], out: Path | None) -> None:
    """Print the medians; write all figures."""
    ratios = [each[2] / each[1] for each in rounds]
    for count in (1, 2):
        speed = statistics.median(each[count] for each in rounds)
        print(f"{count} engine(s): {speed:.1f} tokens per second")
    print(
        f"two over one: {statistics.median(ratios):.2f} (median of {len(ratios)} rounds in turns, "
        f"{min(ratios):.2f} to {max(ratios):.2f})"
    )
    if out:
        write_json(
            out,
            {
                **provenance(None),
                "command": shlex.join(["python", *sys.argv]),
                "tokens_per_second": [
                    {str(n): round(speed, 1) for n, speed in each.items()} for each in rounds
                ],
                "two_over_one": [round(ratio, 3) for ratio in ratios],
            },
        )


if __name__ == "__main__":
    main()
