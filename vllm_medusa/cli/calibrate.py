"""`vllm-medusa calibrate`: the draft trees that pay, from measurements on this machine."""

from __future__ import annotations

import argparse

from vllm_medusa.cli.arguments import add_settings, given_settings, numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    from vllm_medusa.calibration.settings import CalibrateSettings

    parser.add_argument("heads", metavar="HEADS", help="Medusa heads: directory, file or hub name")
    add_settings(parser, CalibrateSettings, "revision", "model", "model_revision", "prompts")
    add_settings(parser, CalibrateSettings, "max_prompts", "out", "max_tokens", "temperature")
    add_settings(parser, CalibrateSettings, "sizes", "dtype", "llm_options", "seed")
    costs = parser.add_argument_group("step costs")
    add_settings(costs, CalibrateSettings, "batch_sizes", "cost_sizes", "rounds")
    add_settings(costs, CalibrateSettings, "engines_at_once", "step_costs", "with_step_costs")
    check = parser.add_argument_group("check against the engine")
    check.add_argument(
        "--check",
        dest="check_sizes",
        type=numbers(int),
        nargs="?",
        const=(16, 32, 64),
        default=argparse.SUPPRESS,
        metavar="N,N",
        help="Measure trees of these sizes in the engine (16,32,64)",
    )
    add_settings(check, CalibrateSettings, "check_prompts")


def run(arguments: argparse.Namespace) -> str:
    """Calibrate; return the text to print.

    Raises:
        UserError: settings, prompts, heads or a model that cannot be used.
    """
    from vllm_medusa.calibration.run import calibrate
    from vllm_medusa.calibration.settings import CalibrateSettings

    return calibrate(CalibrateSettings(**given_settings(CalibrateSettings, arguments)))
