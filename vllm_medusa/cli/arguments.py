"""Arguments that several sub-commands share."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_medusa.heads.checkpoint import HeadsCheckpoint
    from vllm_medusa.target.config import Target


def add_heads_and_model(parser: argparse.ArgumentParser, heads_metavar: str, model: str) -> None:
    """Declare a positional argument for heads and options for their target model.

    Args:
        parser: of the sub-command.
        heads_metavar: what the usage line calls the heads.
        model: what the target model is for.
    """
    parser.add_argument("heads", metavar=heads_metavar, help="heads: directory, file or hub name")
    parser.add_argument("--revision", help="of the heads, if a hub name")
    parser.add_argument(
        "--model", metavar="M", help=f"the target model (directory or hub name): {model}"
    )
    parser.add_argument("--model-revision", help="of the target model, if a hub name")


def load_heads_and_model(arguments: argparse.Namespace) -> tuple[HeadsCheckpoint, Target | None]:
    """Load the heads, checked against the target model if one is given.

    Raises:
        UserError: unusable heads, or ones that do not fit the model.
    """
    from vllm_medusa.heads import load_heads
    from vllm_medusa.target.config import read_target

    if arguments.model is None:
        return load_heads(arguments.heads, revision=arguments.revision), None
    target = read_target(arguments.model, revision=arguments.model_revision)
    heads = load_heads(
        arguments.heads,
        revision=arguments.revision,
        target_hidden_size=target.hidden_size,
        target_vocab_size=target.vocab_size,
    )
    return heads, target


def json_object(text: str) -> dict[str, Any]:
    """Read an argument that is a JSON object; for ``type=``."""
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({exc})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
