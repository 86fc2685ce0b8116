"""The bar that every command shows, in a terminal and in a log file."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from vllm_medusa.reporting import progress
from vllm_medusa.reporting.progress import Bar


def console(is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=120, color_system=None)


def shown(bar: Bar) -> str:
    return bar.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_log_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Bar("distill", "answers", 1200, 200, console=console(False)) as bar:
        for now in (1.0, 2.0, 40.0, 41.0):
            bar.advance(250, f"[{now:.0f}]")
    first, last = shown(bar).splitlines()
    assert first.startswith("distill: 950/1,200 answers")
    assert "[40]" in first
    assert last.startswith("distill: 1,200/1,200 answers")
    assert "[41]" in last


def test_terminal_shows_a_bar_and_what_stands_above() -> None:
    above: list[Any] = ["a table"]
    with Bar("bench", "turns", 4, console=console(True), above=lambda: above) as bar:
        bar.advance()
        bar.advance(1, "tree")
        bar.say("a line with [brackets]")
    text = shown(bar)
    assert "a table" in text
    assert "2/4 turns" in text
    assert "tree" in text
    assert "a line with [brackets]" in text


def test_time_left_is_that_of_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    with Bar("bench", "turns", 10, console=console(False)) as bar:
        monkeypatch.setattr(bar._bar, "get_time", lambda: now)
        assert bar.seconds_left is None
        for now in (0.0, 5.0, 10.0, 15.0):  # noqa: B007
            bar.advance()
    assert bar.seconds_left == 30


def test_time_left_where_the_total_is_known_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    with Bar("bench", "turns", 0, console=console(False)) as bar:
        monkeypatch.setattr(bar._bar, "get_time", lambda: now)
        bar.advance(0, "starting")
        bar.set_total(10)
        for now in (0.0, 5.0, 10.0, 15.0):  # noqa: B007
            bar.advance()
        assert bar.seconds_left == 30


@pytest.mark.parametrize("is_terminal", [True, False])
def test_hidden_bar_says_nothing(is_terminal: bool) -> None:
    with Bar("training", "tokens", 2, is_shown=False, console=console(is_terminal)) as bar:
        bar.advance(2)
    assert shown(bar) == ""
