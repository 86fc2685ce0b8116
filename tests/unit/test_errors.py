"""How messages show what a user gave."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_medusa.errors import UserError, shown


@pytest.mark.parametrize("value", ["cpu-16", 4, None, True, [[0], [1], [0, 0]], (1, 4, 16), 1.5])
def test_short_values_are_shown_whole(value: Any) -> None:
    assert shown(value) == repr(value)


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "beginning"),
    [
        ("x" * 3000, "'xxx"),
        (["x" * 3000] * 1000, "['xxx"),
        ({"x" * 3000: "y" * 3000}, "{'xxx"),
        ([[0] * 1000] * 1000, "[[0, 0"),
        (nested(5000), "[[["),
        (10**3000, "1000"),
        (Path("x" * 3000), "PosixPath('xxx"),
        (np.zeros((100, 100)), "array([[0., 0."),
        (Exception("x" * 3000), "Exception('xxx"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_long_values_are_cut(value: Any, beginning: str) -> None:
    text = shown(value)
    assert text.startswith(beginning)
    assert len(text) < 200
    assert "..." in text


def test_messages_are_one_line() -> None:
    assert str(UserError(f"a {shown(np.zeros((2, 2)))}\n  b")) == "a array([[0., 0.], [0., 0.]]) b"
