"""`vllm-medusa convert`: Medusa heads in another program's format."""

import argparse
from pathlib import Path

from vllm_medusa.cli.arguments import add_heads_and_model, load_heads_and_model

FORMATS = ("vllm", "fasterdecoding", "tgi")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_heads_and_model(
        parser,
        "IN",
        "the heads are checked against it and name it in their config.json; they get a copy of "
        "its lm_head if they use it and the format needs one",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write the heads to")
    parser.add_argument("--to", dest="write_format", choices=FORMATS, required=True)
    parser.add_argument(
        "--force", action="store_true", help="replace the heads of an earlier conversion to OUT"
    )


def run(arguments: argparse.Namespace) -> str:
    """Convert; return the text to print.

    Raises:
        UserError: unusable heads, or ones that the format cannot hold.
    """
    import dataclasses

    from vllm_medusa.heads.io.write import needs_lm_head, save_heads, with_target_lm_head
    from vllm_medusa.target.config import read_lm_head

    heads, target = load_heads_and_model(arguments)
    if target is not None:
        heads = dataclasses.replace(heads, base_model=target.name)
        if needs_lm_head(heads, arguments.write_format):
            heads = with_target_lm_head(heads, read_lm_head(target))
    save_heads(heads, arguments.out, arguments.write_format, overwrite=arguments.force)
    return (
        f"wrote {heads.spec.num_heads} heads, read as {heads.spec.source_format}, as "
        f"{arguments.write_format} to {arguments.out}"
    )
