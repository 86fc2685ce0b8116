"""`vllm-medusa bench`: draft trees against everything else that vLLM offers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_medusa.cli.arguments import json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; those not given are None, as a YAML file may give them."""
    add = parser.add_argument
    add("--model", metavar="M", help="the target model: directory or hub name")
    add("--heads", metavar="H", help="its Medusa heads (default: in the model's own directory)")
    add(
        "--variants",
        nargs="+",
        metavar="V",
        help="baseline, tree, tree=TREE, chain, vllm-chain, ngram, suffix, draft_model=PATH, "
        "eagle=PATH, eagle3=PATH or 'name={JSON of a speculative config}' "
        "(baseline tree chain vllm-chain ngram)",
    )
    add("--config", type=Path, metavar="YAML", help="variants and settings from a file")
    add("--prompts", metavar="P", help="a JSONL file, builtin (default) or random")
    add("--random-len", type=int, metavar="N", help="tokens of a random prompt (128)")
    add("--max-tokens", type=int, metavar="N", help="new tokens of a request (128)")
    add("--rounds", type=int, metavar="R", help="how often each variant has its turn (5)")
    add("--ignore-eos", action="store_true", default=None, help="always write --max-tokens tokens")
    add("--dtype", help="of the model: auto (default), bfloat16, float16, float32")
    add("--llm-options", type=json_object, metavar="JSON", help="further arguments of vllm.LLM")
    add(
        "--threads",
        type=int,
        metavar="T",
        help="of an engine ($OMP_NUM_THREADS, on a CPU all cores)",
    )
    add("--alive", choices=("auto", "all", "one"), help="engines alive at once (auto)")
    add("--seed", type=int, metavar="S", help="of random prompts and engines (0)")
    add("--strict", action="store_true", default=None, help="fail if lossless outputs differ")
    add("--out", type=Path, metavar="DIR", help="directory of the results (bench-results)")
    add("--overwrite", action="store_true", default=None, help="replace results there")
    _add_load_arguments(parser)
    parser.add_argument(
        "--profile-steps",
        action="store_true",
        default=None,
        help="time engine steps by draft nodes and batch size, for calibrate --step-costs",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="say what changed between two runs (results.json or its directory); measure nothing",
    )


def _add_load_arguments(parser: argparse.ArgumentParser) -> None:
    offline = parser.add_argument_group("offline (default)").add_argument
    offline("--batch-sizes", type=_integers, metavar="B,B", help="requests at once (1,2,4,8,16,32)")
    offline(
        "--min-prompts",
        type=int,
        metavar="N",
        help="run so many at every batch size, in further rounds for small ones (1)",
    )
    online = parser.add_argument_group("online: vllm serve, driven by vllm bench serve")
    online.add_argument("--online", action="store_true", default=None, help="measure servers")
    online.add_argument(
        "--request-rates", type=_rates, metavar="R,R", help="requests per second (1,2,inf)"
    )
    online.add_argument(
        "--concurrency", type=_integers, metavar="C,C", help="requests at once at most (no bound)"
    )
    online.add_argument(
        "--num-requests", type=int, metavar="N", help="requests of one measurement (32)"
    )


def run(arguments: argparse.Namespace) -> str:
    """Compare, and say what came out.

    Raises:
        UserError: something that the user has to mend.
    """
    if arguments.compare is not None:
        from vllm_medusa.bench.compare import compare_runs

        return compare_runs(*arguments.compare)
    from vllm_medusa.bench.run import run as run_bench
    from vllm_medusa.bench.settings import settings_from

    own = ("command", "config", "compare")
    given: dict[str, Any] = {
        name: value for name, value in vars(arguments).items() if name not in own
    }
    if given["variants"] is not None:
        given["variants"] = tuple(given["variants"])
    return run_bench(settings_from(given, arguments.config))


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not integers with commas") from None


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers with commas") from None
