"""What drafting a static tree costs, by the kind of heads.

All heads are loaded into one engine's process and take turns: each draws the tokens of a tree from
the same hidden states. A ratio is taken within a round. The target runs no step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Proposals of one kind in a round, of which the median counts.
REPEATS = 20


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("heads", nargs="+", help="heads of the model; ratios are over the first")
    parser.add_argument("--model", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--tree", default="cpu-16")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = LLM(
        args.model,
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=512,
        num_gpu_blocks_override=200,
        speculative_config={"method": "medusa", "model": args.heads[0], "tree": args.tree},
    )
    (found,) = llm.collective_rpc(measure, args=(args.heads, args.batch_sizes, args.rounds))
    print(json.dumps(found))
    print(f"{'heads':<40} {'batch':>5} {'ms':>8}  over the first (least to most)")
    for (name, batch_size), times in zip(found["rows"], found["ms"], strict=True):
        first = found["ms"][found["rows"].index([args.heads[0], batch_size])]
        ratios = [own / other for own, other in zip(times, first, strict=True)]
        print(
            f"{name:<40} {batch_size:>5} {statistics.median(times):>8.3f}  "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def measure(
    worker: Any, heads: list[str], batch_sizes: list[int], num_rounds: int
) -> dict[str, list[Any]]:
    """Time the proposals: [rows][rounds] milliseconds."""
    import torch

    from vllm_medusa.config import CONFIG_KEY
    from vllm_medusa.heads import HeadsReader
    from vllm_medusa.plugin.worker.proposer import MedusaProposer

    config, model = worker.vllm_config, worker.model_runner.model
    proposers = []
    for name in heads:
        values = config.additional_config[CONFIG_KEY] | {
            "heads": name,
            "in_turn": HeadsReader(name).spec.is_sequential,
        }
        proposer = MedusaProposer(
            SimpleNamespace(  # type: ignore[arg-type]
                additional_config={CONFIG_KEY: values},
                device_config=config.device_config,
                model_config=config.model_config,
                scheduler_config=config.scheduler_config,
            )
        )
        proposer.load_model(model)
        proposers.append(proposer)
    rows = [[name, batch_size] for batch_size in batch_sizes for name in heads]
    hidden_size = config.model_config.get_hidden_size()
    ms: list[list[float]] = [[] for _ in rows]
    for _ in range(num_rounds + 1):
        for row, (name, batch_size) in enumerate(rows):
            hidden = torch.randn(batch_size, hidden_size, dtype=config.model_config.dtype)
            roots = torch.arange(batch_size)
            times = []
            for _ in range(REPEATS):
                begin = time.perf_counter()
                prefix = proposers[heads.index(name)].prefix
                ends = None if prefix is None else prefix.rehearse(hidden, roots)
                proposers[heads.index(name)].propose(hidden, roots, ends)
                times.append(time.perf_counter() - begin)
            ms[row].append(1000 * statistics.median(times))
    return {"rows": rows, "ms": [times[1:] for times in ms]}  # the first round warms up


if __name__ == "__main__":
    main()
