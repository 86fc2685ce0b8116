"""What the terminal shows while a comparison runs: a table, progress, time left."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType

import rich.console
import rich.live
import rich.text

from vllm_medusa.bench.tables import Table


class TimeLeft:
    """Estimates the time that the turns to come take from those that were.

    A turn is expected to take as long as the median of its own kind, else as long as the median of
    all.
    """

    def __init__(self) -> None:
        self._pending: list[str] = []
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def expect(self, kinds: Sequence[str]) -> None:
        """Say what is to come, in order."""
        self._pending = list(kinds)

    def done(self, kind: str, seconds: float) -> None:
        """Say that a turn of this kind has ended."""
        if kind in self._pending:
            self._pending.remove(kind)
        self._seconds[kind].append(seconds)

    def drop(self, belongs: Callable[[str], bool]) -> None:
        """Expect no turn of these kinds any more."""
        self._pending = [kind for kind in self._pending if not belongs(kind)]

    @property
    def num_pending(self) -> int:
        """Turns to come."""
        return len(self._pending)

    def estimate(self) -> float | None:
        """Seconds left; None before the first turn."""
        if not self._seconds:
            return None
        every = statistics.median(second for all_ in self._seconds.values() for second in all_)
        return sum(
            statistics.median(self._seconds[kind]) if kind in self._seconds else every
            for kind in self._pending
        )


class Display:
    """A live table on a terminal, else a line for each event; use as a context manager.

    Args:
        table: builds the table from all that was measured so far.
        console: where to show it; None: standard error.
    """

    def __init__(
        self, table: Callable[[], Table], console: rich.console.Console | None = None
    ) -> None:
        self._console = console or rich.console.Console(stderr=True)
        self._table = table
        self._time_left = TimeLeft()
        self._since = time.monotonic()
        self._live: rich.live.Live | None = None
        if self._console.is_terminal:
            self._live = rich.live.Live(console=self._console, auto_refresh=False, transient=True)

    def expect(self, kinds: Sequence[str]) -> None:
        """Say what is to come, in order."""
        self._time_left.expect(kinds)

    def begin(self, what: str) -> None:
        """Say what is being done now."""
        self._since = time.monotonic()
        self._show(what)

    def done(self, kind: str, line: str) -> None:
        """Say that a turn has ended, and what it gave."""
        self._time_left.done(kind, time.monotonic() - self._since)
        self._say(f"{line} ({self._left()})")

    def drop(self, belongs: Callable[[str], bool], line: str) -> None:
        """Expect no turn of these kinds any more, and say why."""
        self._time_left.drop(belongs)
        self._say(line)

    def _left(self) -> str:
        seconds = self._time_left.estimate()
        pending = f"{self._time_left.num_pending} turns left"
        if seconds is None or not self._time_left.num_pending:
            return pending
        minutes, rest = divmod(round(seconds), 60)
        return f"{pending}, about {f'{minutes} min ' if minutes else ''}{rest} s"

    def _show(self, now: str) -> None:
        if self._live:
            progress = rich.text.Text(f"{now}; {self._left()}")
            self._live.update(rich.console.Group(self._table().rich(), progress), refresh=True)

    def say(self, text: str) -> None:
        """Print a text that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _say(self, line: str) -> None:
        if self._live:
            self._show(line)
        else:
            self.say(line)

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
