"""Settings of a command: data classes whose values are checked when they are made.

One definition serves the library, YAML files and the command line: `vllm_medusa.cli.arguments`
makes an option of a field's name, type, default and docstring.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from vllm_medusa.errors import UserError

S = TypeVar("S")

_CONFIG = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)
#: pydantic's words, and ours.
_WORDS = (
    ("Input should be", "must be"),
    ("Value error, ", ""),
    ("greater than or equal to", "at least"),
    ("greater than", "above"),
    ("less than or equal to", "at most"),
    ("tuple", "list"),
    ("dictionary", "JSON object"),
)
_LONGEST_VALUE = 80


def _check_share(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError("must be between 0 and 1")
    return value


def _check_different(values: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(values)) != len(values):
        raise ValueError("must be different numbers")
    return values


#: Positive integers, each of them once.
Counts = Annotated[tuple[PositiveInt, ...], Field(strict=False), AfterValidator(_check_different)]
#: A number from 0 to 1.
Share = Annotated[float, AfterValidator(_check_share)]
#: A path, or a text that is one.
PathText = Annotated[Path, Field(strict=False)]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field, Field))
def settings(cls: type[S]) -> type[S]:
    """Make a frozen data class that checks its values; its errors are one line.

    A field's docstring says what the setting is. ``FLAGS``, if the class has it, gives the command
    line's options that are not named like their field. ``__post_init__`` checks what the fields
    cannot express.

    Raises:
        UserError: on creation: a wrong value, or a missing setting.
    """
    checked: Any = dataclass(cls, kw_only=True, frozen=True, config=_CONFIG)
    initialise: Callable[..., None] = checked.__init__

    @functools.wraps(initialise)
    def in_one_line(self: S, **values: Any) -> None:
        try:
            initialise(self, **values)
        except ValidationError as exc:
            # The error of a wrong name, not that of the right name, which is missing because of it.
            first = min(exc.errors(), key=lambda error: error["type"] == "missing")
            raise UserError(_message(checked, first)) from None

    checked.__init__ = in_one_line
    made: type[S] = checked
    return made


def flag_of(cls: type, name: str) -> str:
    """The command line's option for a setting."""
    flags: Mapping[str, str] = getattr(cls, "FLAGS", {})
    return flags.get(name, f"--{name.replace('_', '-')}")


def as_json(of: Any) -> dict[str, Any]:
    """All settings as JSON has them."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(of).items()}


def refuse_own_options(options: Mapping[str, Any], own: Mapping[str, str]) -> None:
    """Check that ``--llm-options`` has no option that the command itself sets.

    Args:
        options: arguments of ``vllm.LLM`` that were given.
        own: names of arguments, and what sets each.

    Raises:
        UserError: one of them is given.
    """
    for name, setter in own.items():
        if name in options:
            raise UserError(f"--llm-options: {name!r} is set by {setter}")


def _message(cls: Any, error: Any) -> str:
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return str(cause)
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return f"no {name} given; give {flag_of(cls, name)}"
    if error["type"] == "unexpected_keyword_argument":
        known = ", ".join(setting.name for setting in fields(cls))
        return f"unknown setting {name!r}; known are {known}"
    text = str(error["msg"])
    for theirs, ours in _WORDS:
        text = text.replace(theirs, ours)
    value = repr(error["input"])
    if len(value) > _LONGEST_VALUE:
        value = f"{value[:_LONGEST_VALUE]}..."
    return f"{flag_of(cls, name)} {value}: {text}"
