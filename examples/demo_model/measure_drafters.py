#!/usr/bin/env python3
"""Measure every drafter of the demo in vLLM: tokens per step, and whether the outputs are equal.

All of the demo's prompts, greedy, as one batch; one engine at a time, each in a process of its
own. Equality is with the same engine without speculation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import DemoError, provenance, require, write_json

from vllm_medusa.bench.process import EngineProcess, EngineProcessError, Run

DEMO = Path(__file__).parents[2] / "demo"
NUM_DRAFTS = 4


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=DEMO, help="the demo's directory")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=DEMO / "drafters.json")
    return parser.parse_args()


def speculative_configs(demo: Path) -> dict[str, dict[str, Any] | None]:
    """Every variant's speculative config, by name."""
    heads = {"method": "medusa", "model": str(demo / "heads")}
    chain = {"num_speculative_tokens": NUM_DRAFTS}
    lookup = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
    for name in ("draft-model", "eagle", "eagle3"):
        script = "train_draft_model.py" if name == "draft-model" else "train_eagle.py"
        require(demo / name / "config.json", script)
    return {
        "no speculation": None,
        "n-gram": {"method": "ngram", **lookup, **chain},
        "Medusa chain of 4": {**heads, "tree": "chain"},
        "draft model": {"method": "draft_model", "model": str(demo / "draft-model"), **chain},
        "EAGLE": {"method": "eagle", "model": str(demo / "eagle"), **chain},
        "EAGLE-3": {"method": "eagle3", "model": str(demo / "eagle3"), **chain},
        "Medusa tree of 16": {**heads, "num_speculative_tokens": 16},
    }


def run_variant(
    demo: Path, config: Mapping[str, Any] | None, dtype: str, prompts: list[str], new_tokens: int
) -> Run:
    """Continue all prompts in a fresh engine."""
    options: dict[str, Any] = {
        "model": str(demo / "model"),
        "dtype": dtype,
        "enforce_eager": True,
        "max_model_len": 512,
        "block_size": 32,
        "num_gpu_blocks_override": 1200,
        "seed": 0,
    }
    if config is not None:
        options["speculative_config"] = dict(config)
    with EngineProcess(options) as engine:
        engine.wait()
        return engine.run(prompts, new_tokens)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write."""
    lines = (arguments.demo / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for dtype in arguments.dtypes:
        baseline: list[list[int]] = []
        for name, config in speculative_configs(arguments.demo).items():
            result = run_variant(arguments.demo, config, dtype, prompts, arguments.new_tokens)
            baseline = baseline or result.token_ids
            equal = sum(a == b for a, b in zip(result.token_ids, baseline, strict=True))
            measured.setdefault(name, {})[dtype] = {
                "tokens_per_step": round(result.tokens_per_step, 3),
                "num_drafts": result.num_drafts,
                "num_accepted": result.num_accepted,
                "equal_outputs": equal,
            }
            print(
                f"{dtype} {name}: {result.tokens_per_step:.2f} tokens per step, "
                f"{equal} of {len(prompts)} outputs equal",
                flush=True,
            )
    facts = provenance(prompts=len(prompts), new_tokens=arguments.new_tokens)
    write_json(arguments.out, {"provenance": facts, "variants": measured})


def main() -> int:
    """Run, with errors in one line."""
    try:
        run(parse_arguments())
    except (DemoError, OSError, EngineProcessError) as error:
        print(f"measure_drafters: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
