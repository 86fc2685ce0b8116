"""Options made of settings, and arguments that several sub-commands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from vllm_medusa.settings import flag_of

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
    parser.add_argument("--revision", help="revision of the heads, if they are a hub name")
    parser.add_argument(
        "--model", metavar="M", help=f"the target model (directory or hub name): {model}"
    )
    parser.add_argument(
        "--model-revision", help="revision of the target model, if it is a hub name"
    )


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


_METAVARS = {int: "N", float: "X", str: "NAME", Path: "PATH"}


def add_settings(parser: Any, cls: Any, *names: str) -> None:
    """Declare an option for each of some settings; what is not given stays out of the namespace.

    Args:
        parser: of the sub-command, or a group of it.
        cls: a class of `vllm_medusa.settings.settings`.
        names: of its fields, in the order of the help.
    """
    defaults = {
        field.name: field.default if field.default_factory is MISSING else None
        for field in fields(cls)
    }
    types = get_type_hints(cls)
    for name in names:
        text = str(cls.__pydantic_fields__[name].description).replace("\n", " ").rstrip(".")
        default = _in_words(defaults[name])
        parser.add_argument(
            flag_of(cls, name),
            dest=name,
            default=argparse.SUPPRESS,
            help=(text + (f" ({default})" if default else "")).replace("%", "%%"),
            **_reading(types[name], defaults[name]),
        )


def given_settings(cls: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of a class that the command line gives."""
    given = vars(arguments)
    return {field.name: given[field.name] for field in fields(cls) if field.name in given}


def _in_words(default: Any) -> str:
    """A default as the command line takes it; empty if there is nothing to say."""
    if default is MISSING:
        return "required"
    if isinstance(default, tuple):
        return ",".join(f"{number:g}" for number in default)
    return "" if default is None or isinstance(default, bool) else str(default)


def _reading(annotation: Any, default: Any) -> dict[str, Any]:
    """How argparse reads a value of a type."""
    types = [kind for kind in get_args(annotation) if kind is not NoneType]
    origin = get_origin(annotation)
    if annotation is bool:
        return {"action": "store_false" if default else "store_true"}
    if origin is Literal:
        return {"choices": types}
    if origin is tuple and types[0] is Path:
        return {"type": Path, "metavar": "PATH", "nargs": "+"}
    if origin is tuple:
        metavar = _METAVARS[types[0]]
        return {"type": numbers(types[0]), "metavar": f"{metavar},{metavar}"}
    if origin is Mapping:
        return {"type": json_object, "metavar": "JSON"}
    if types:  # a type or nothing
        return _reading(types[0], default)
    return {"type": annotation, "metavar": _METAVARS[annotation]}


def numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """Reads numbers of a type with commas between them; for ``type=``."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form 8,16,32") from None

    return read
