"""`vllm-medusa bench`: draft trees and vLLM's other speculative methods, compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_medusa.cli.arguments import add_settings, given_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from vllm_medusa.bench.settings import DEFAULT_VARIANTS, Settings
    from vllm_medusa.bench.variants import KINDS

    add_settings(parser, Settings, "model", "heads")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="V",
        help=f"{KINDS} ({' '.join(DEFAULT_VARIANTS)})",
    )
    parser.add_argument(
        "--config", type=Path, metavar="YAML", help="File with variants and settings"
    )
    add_settings(parser, Settings, "prompts", "random_len", "max_tokens", "temperature", "rounds")
    add_settings(parser, Settings, "ignore_eos", "dtype", "llm_options")
    add_settings(parser, Settings, "threads", "alive", "seed", "strict", "out", "overwrite")
    offline = parser.add_argument_group("offline (default)")
    add_settings(offline, Settings, "batch_sizes", "min_prompts")
    online = parser.add_argument_group("online: vllm serve, measured by vllm bench serve")
    add_settings(online, Settings, "online", "request_rates", "concurrency", "num_requests")
    add_settings(parser, Settings, "profile_steps")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="Show the differences of two runs (results.json or its directory); measure nothing",
    )


def run(arguments: argparse.Namespace) -> str:
    """Compare; return the text to print.

    Raises:
        UserError: something that the user has to correct.
    """
    if arguments.compare is not None:
        from vllm_medusa.bench.compare import compare_runs

        return compare_runs(*arguments.compare)
    from vllm_medusa.bench.run import run as run_bench
    from vllm_medusa.bench.settings import Settings, settings_from

    return run_bench(settings_from(given_settings(Settings, arguments), arguments.config))
