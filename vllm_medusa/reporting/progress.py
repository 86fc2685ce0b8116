"""Progress of long work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import rich.console
import rich.progress
import rich.text

#: Called with the number of things that are newly done.
Progress: TypeAlias = Callable[[int], object]

_SECONDS_BETWEEN_LINES = 30.0
#: Time over which rates and the time left are estimated.
_SECONDS_OF_RATE = 600.0


class Bar(AbstractContextManager["Bar"]):
    """Shows on standard error how much of some work is done; use as a context manager.

    On a terminal a bar moves. In a log file a line is written every half a minute, and at the end.

    Args:
        what: the work.
        unit: what is counted, in the plural.
        total: how many there will be.
        done: of these, how many there are already.
        is_shown: whether to show anything.
        writes_lines: whether to write lines if the output is not a terminal.
        above: makes the content above the bar on a terminal.
        console: where to show it; None: standard error.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int,
        done: int = 0,
        *,
        is_shown: bool = True,
        writes_lines: bool = True,
        above: Callable[[], Iterable[Any]] = tuple,
        console: rich.console.Console | None = None,
    ) -> None:
        self.console = console or rich.console.Console(stderr=True)
        self.is_live = is_shown and self.console.is_terminal
        self._writes_lines = is_shown and writes_lines and not self.is_live
        amount = f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit}"
        self._columns = [
            rich.progress.TextColumn("{task.description}:", markup=False),
            rich.progress.TextColumn(amount, markup=False),
            _Speed(unit),
            rich.progress.TextColumn("{task.fields[note]}", markup=False),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left", markup=False),
            rich.progress.TimeRemainingColumn(),
        ]
        self._bar = _Progress(
            *self._columns,
            rich.progress.BarColumn(),
            console=self.console,
            disable=not self.is_live,
            speed_estimate_period=_SECONDS_OF_RATE,
        )
        self._bar.above = above
        self._task = self._bar.add_task(what, total=total, completed=done, note="")
        self._last_line = time.monotonic()

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Add to what is done, with a text that stays until the next one."""
        self._bar.update(self._task, advance=count)
        if note is not None:
            self._bar.update(self._task, note=note)
        if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._write_line()

    def set_total(self, total: int) -> None:
        """Change the total."""
        # `update` would reset the rate.
        task = self._bar.tasks[0]
        task.total = total
        if task.completed < total:
            task.finished_time = None

    @property
    def done(self) -> int:
        """How many are done."""
        return int(self._bar.tasks[0].completed)

    @property
    def seconds_left(self) -> float | None:
        """Estimated time for the rest; None if there is no estimate yet."""
        return self._bar.tasks[0].time_remaining

    def _write_line(self) -> None:
        self._last_line = time.monotonic()
        if self._writes_lines:
            task = self._bar.tasks[0]
            self.say(" ".join(filter(None, (str(column(task)) for column in self._columns))))

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._write_line()
        self._bar.stop()


class _Speed(rich.progress.ProgressColumn):
    """Units per second, once known."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        return rich.text.Text(f"{task.speed:,.1f} {self._unit}/s" if task.speed else "")


class _Progress(rich.progress.Progress):
    """A progress bar with content above it."""

    above: Callable[[], Iterable[Any]] = tuple

    def get_renderables(self) -> Iterable[Any]:
        yield from self.above()
        yield from super().get_renderables()
