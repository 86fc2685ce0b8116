"""Settings: what is refused, in which words, and the options that are made of them."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import PositiveInt

from vllm_medusa.bench.settings import Settings
from vllm_medusa.calibration.settings import CalibrateSettings
from vllm_medusa.cli import main as cli
from vllm_medusa.cli.arguments import add_settings, given_settings
from vllm_medusa.distill.settings import DistillSettings
from vllm_medusa.errors import UserError
from vllm_medusa.settings import Counts, PathText, Share, as_json, settings
from vllm_medusa.target.settings import AnswerSettings
from vllm_medusa.training.settings import TrainSettings


@settings
class Some:
    """Settings of all kinds."""

    FLAGS: ClassVar[Mapping[str, str]] = {"with_meat": "--no-meat"}

    name: str
    """Its name."""
    count: PositiveInt = 3
    """How many, 100 % of them."""
    share: Share = 0.5
    """Which part."""
    sizes: Counts = (1, 2)
    """Some sizes."""
    place: PathText | None = None
    """Where."""
    kind: Literal["a", "b"] = "a"
    """Which kind."""
    is_quick: bool = False
    """Hurry."""
    with_meat: bool = True
    """Leave the meat out."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further ones."""

    def __post_init__(self) -> None:
        if self.count > 99:
            raise UserError(f"--count {self.count}: too many; give fewer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "--count 0: must be above 0"),
        ({"count": True}, "--count True: must be a valid integer"),
        ({"count": "3"}, "--count '3': must be a valid integer"),
        ({"count": 100}, "--count 100: too many; give fewer"),
        ({"share": 1.5}, "--share 1.5: must be between 0 and 1"),
        ({"share": math.nan}, "--share nan: must be between 0 and 1"),
        ({"sizes": 3}, "--sizes 3: must be a valid list"),
        ({"sizes": (1, 0)}, "--sizes 0: must be above 0"),
        ({"sizes": (2, 2)}, "--sizes (2, 2): must be different numbers"),
        ({"kind": "c"}, "--kind 'c': must be 'a' or 'b'"),
        ({"with_meat": 1}, "--no-meat 1: must be a valid boolean"),
        ({"options": []}, "--options []: must be a valid JSON object"),
        ({"name": None}, "--name None: must be a valid string"),
        ({"name": ["x" * 3000]}, f"--name ['{'x' * 78}...: must be a valid string"),
        ({"nam": "x"}, "unknown setting 'nam'; known are name, count, share, sizes, "),
    ],
)
def test_refusal_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Some(**{"name": "n", **changes})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_missing_setting() -> None:
    with pytest.raises(UserError, match=r"^no name given; give --name$"):
        Some()  # type: ignore[call-arg]
    with pytest.raises(UserError, match="unknown setting 'nam'"):
        Some(nam="x")  # type: ignore[call-arg]


def test_changed_copy_is_checked_too() -> None:
    some = Some(name="n")
    assert dataclasses.replace(some, count=5).count == 5
    with pytest.raises(UserError, match="--count -1"):
        dataclasses.replace(some, count=-1)


def test_json() -> None:
    written = as_json(Some(name="n", place=Path("x"), sizes=[4]))  # type: ignore[arg-type]
    assert (written["place"], written["sizes"], written["options"]) == ("x", (4,), {})


NAMES = [field.name for field in dataclasses.fields(Some)]


def parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_settings(parser, Some, *NAMES)
    return given_settings(Some, parser.parse_args(arguments))


def test_options_of_settings() -> None:
    assert parse() == {}
    given = parse(
        *("--name", "n", "--count", "4", "--share", "0.1", "--sizes", "3,4", "--place", "p"),
        *("--kind", "b", "--is-quick", "--no-meat", "--options", '{"a": 1}'),
    )
    assert given == {
        "name": "n",
        "count": 4,
        "share": 0.1,
        "sizes": (3, 4),
        "place": Path("p"),
        "kind": "b",
        "is_quick": True,
        "with_meat": False,
        "options": {"a": 1},
    }
    assert dataclasses.asdict(Some(**given)) == given


def test_help_is_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, Some, *NAMES)
    text = " ".join(parser.format_help().split())
    for part in (
        "--name NAME Its name (required)",
        "--count N How many, 100 % of them (3)",
        "--sizes N,N Some sizes (1,2)",
        "--place PATH Where --kind {a,b} Which kind (a)",
        "--no-meat Leave the meat out --options JSON Further ones",
    ):
        assert part in text


@pytest.mark.parametrize("text", ["", "1,x", "1.5"])
def test_malformed_numbers_are_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentError, match="is not of the form 8,16,32"):
        parse("--sizes", text)


@pytest.mark.parametrize(
    ("command", "classes"),
    [
        ("bench", [Settings]),
        ("calibrate", [CalibrateSettings]),
        ("distill", [AnswerSettings, DistillSettings]),
        ("train", [TrainSettings]),
    ],
)
def test_every_setting_has_an_option_and_a_word_of_help(command: str, classes: list[Any]) -> None:
    parser = argparse.ArgumentParser()
    import_module(f"vllm_medusa.cli.{command}").add_arguments(parser)
    options = {action.dest: action.help for action in parser._actions}
    for cls in classes:
        for field in dataclasses.fields(cls):
            assert options.get(field.name) or field.name == "answers", field.name


def test_missing_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data", "d", "--out", "o"]) == 2
    assert capsys.readouterr().err == ("vllm-medusa train: error: no model given; give --model\n")
