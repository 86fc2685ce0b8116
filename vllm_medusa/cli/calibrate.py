"""`vllm-medusa calibrate`: the draft trees that pay, from measurements on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_medusa.cli.arguments import json_object

_SIZES = "4,8,12,16,24,32,48,64"
_BATCH_SIZES = "1,2,4,8,16,32"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("heads", metavar="HEADS", help="heads: directory, file or hub name")
    add("--revision", help="of the heads, if a hub name")
    add("--model", required=True, metavar="M", help="the target model: directory or hub name")
    add("--model-revision", help="of the target model, if a hub name")
    add(
        "--prompts",
        required=True,
        type=Path,
        metavar="FILE",
        help="held-out prompts (JSONL), or a directory of rows that vllm-medusa distill wrote",
    )
    add("--max-prompts", type=int, metavar="N", help="use the first N of them (all)")
    add("--out", type=Path, metavar="DIR", help="where to write (the heads' own directory)")
    add("--max-tokens", type=int, default=128, metavar="N", help="of a continuation (128)")
    add("--temperature", type=float, metavar="T", help="sample continuations at it as well")
    add("--sizes", type=_numbers, default=_SIZES, metavar="N,N", help=f"tree nodes ({_SIZES})")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add(
        "--llm-options",
        type=json_object,
        default={},
        metavar="JSON",
        help="further arguments of vllm.LLM: those that you serve with",
    )
    add("--seed", type=int, default=0, help="of folds and intervals (0)")
    _add_cost_arguments(parser)
    check = parser.add_argument_group("check against the engine").add_argument
    check(
        "--check",
        dest="check_sizes",
        type=_numbers,
        nargs="?",
        const=(16, 32, 64),
        default=(),
        metavar="N,N",
        help="measure trees of these sizes in the engine (16,32,64)",
    )
    check("--check-prompts", type=Path, metavar="FILE", help="other held-out prompts, for that")


def _add_cost_arguments(parser: argparse.ArgumentParser) -> None:
    costs = parser.add_argument_group("step costs").add_argument
    costs(
        "--batch-sizes",
        type=_numbers,
        metavar="N,N",
        help=f"batch sizes to choose trees for ({_BATCH_SIZES})",
    )
    costs("--cost-sizes", type=_numbers, metavar="N,N", help="tree sizes to time (four of --sizes)")
    costs("--rounds", type=int, default=5, metavar="N", help="timed rounds (5)")
    costs(
        "--engines-at-once",
        type=int,
        metavar="N",
        help="engines in memory at a time (all on a CPU, 1 on an accelerator)",
    )
    costs("--step-costs", type=Path, metavar="FILE", help="take costs measured before")
    costs(
        "--no-step-costs",
        dest="with_step_costs",
        action="store_false",
        help="write no tree schedule, only the best trees",
    )


def run(arguments: argparse.Namespace) -> str:
    """Calibrate, and say what was found.

    Raises:
        UserError: settings, prompts, heads or a model that cannot be
            used.
    """
    import dataclasses

    from vllm_medusa.calibration.run import calibrate
    from vllm_medusa.calibration.settings import CalibrateSettings

    names = [field.name for field in dataclasses.fields(CalibrateSettings)]
    return calibrate(CalibrateSettings(**{name: getattr(arguments, name) for name in names}))


def _numbers(text: str) -> tuple[int, ...]:
    """Positive integers, each once, in rising order."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 8,16,32") from None
