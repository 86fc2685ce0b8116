"""The `vllm-medusa` command: one sub-command per module of `vllm_medusa.cli`.

Only the module of the given sub-command is imported and declares its arguments, so that help and
mistakes on the command line do not wait for torch or vLLM.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from vllm_medusa import __version__

#: Sub-command (and module under `vllm_medusa.cli`) to its line in the help.
COMMANDS = {
    "inspect": "show what a checkpoint of Medusa heads holds and whether it fits a model",
    "calibrate": "choose the fastest draft trees for this machine",
    "convert": "write Medusa heads in another program's format",
    "distill": "make training data: a model's own answers to a file of prompts",
    "train": "train Medusa heads for a model on its own answers",
    "trees": "draw the draft trees of a few steps of a prompt, and what was accepted",
    "bench": "compare draft trees with vLLM's other speculative methods",
}


class _Parser(argparse.ArgumentParser):
    """A parser that prints its errors in one line, like all other errors of the tools."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    A module of `vllm_medusa.cli` defines `add_arguments(parser)`, which imports nothing heavy,
    and `run(arguments)`, which returns the text to print. For a user's mistake it raises a
    `UserError`, or another `ValueError` of this package, with a one-line message.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 2 for a user's mistake, which stderr explains in one line.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(prog="vllm-medusa", description="Tools for Medusa heads and draft trees.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_line in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_line, description=help_line)
        if name in given:
            import_module(f"vllm_medusa.cli.{name}").add_arguments(subparser)
    parsed = parser.parse_args(given)
    command = import_module(f"vllm_medusa.cli.{parsed.command}")
    try:
        print(command.run(parsed), flush=True)
    except ValueError as exc:
        if not type(exc).__module__.startswith("vllm_medusa."):
            raise  # a bug: show where
        print(f"vllm-medusa {parsed.command}: error: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
