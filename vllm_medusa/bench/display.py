"""What the terminal shows while a comparison runs: a table, progress, time left."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType

import rich.console
import rich.live
import rich.text

from vllm_medusa.engines.engine import EngineInfo
from vllm_medusa.reporting.tables import Table

#: A variant and what it does: ``start``, or a load such as ``batch 8``.
Turn = tuple[str, str]
START = "start"


class TimeLeft:
    """Estimates the time that the turns to come take from those that were.

    A turn is expected to take the median of those of the same variant that did the same, else of
    those of other variants that did, else of all.
    """

    def __init__(self) -> None:
        self._pending: list[Turn] = []
        self._seconds: dict[Turn, list[float]] = defaultdict(list)

    def expect(self, turns: Sequence[Turn]) -> None:
        """Say what is to come."""
        self._pending = list(turns)

    def done(self, turn: Turn, seconds: float) -> None:
        """Say that a turn has ended."""
        if turn in self._pending:
            self._pending.remove(turn)
        self._seconds[turn].append(seconds)

    def drop(self, variant: str) -> None:
        """Expect nothing of a variant any more."""
        self._pending = [turn for turn in self._pending if turn[0] != variant]

    @property
    def num_pending(self) -> int:
        """Turns to come, starts left out."""
        return sum(turn[1] != START for turn in self._pending)

    def estimate(self) -> float | None:
        """Seconds left; None before the first turn."""
        return sum(map(self._expected, self._pending)) if self._seconds else None

    def _expected(self, turn: Turn) -> float:
        if turn in self._seconds:
            return statistics.median(self._seconds[turn])
        alike = [seconds for other, seconds in self._seconds.items() if other[1] == turn[1]]
        seconds = itertools.chain(*(alike or self._seconds.values()))
        return float(statistics.median(seconds))


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

    def expect(self, turns: Sequence[Turn]) -> None:
        """Say what is to come."""
        self._time_left.expect(turns)

    def begin(self, variant: str) -> None:
        """Say whose turn it is."""
        self._since = time.monotonic()
        self._show(f"now: {variant}")

    def done(self, turn: Turn, line: str) -> None:
        """Say that what began last has ended, and what it gave."""
        now = time.monotonic()
        self._time_left.done(turn, now - self._since)
        self._since = now
        self._say(line)

    def drop(self, variant: str, reason: str) -> None:
        """Expect nothing of a variant any more, and say why."""
        self._time_left.drop(variant)
        self._say(f"{variant}: left out: {reason}")

    def _left(self) -> str:
        seconds = self._time_left.estimate()
        if seconds is None or not self._time_left.num_pending:
            return ""
        minutes, rest = divmod(round(seconds), 60)
        left = f"{minutes} min {rest} s" if minutes else f"{rest} s"
        return f" (turns left: {self._time_left.num_pending}, about {left})"

    def _show(self, now: str) -> None:
        if self._live:
            progress = rich.text.Text(f"{now}{self._left()}")
            table = self._table()
            self._live.update(
                rich.console.Group(rich.text.Text(table.title), table.rich(), progress),
                refresh=True,
            )

    def say(self, text: str) -> None:
        """Print a text that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _say(self, line: str) -> None:
        if self._live:
            self._show(line)
        else:
            self.say(f"{line}{self._left()}")

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


def with_starts(turns: Sequence[Turn], kept_all: bool) -> list[Turn]:
    """Add the starts to come, the first variant being up already.

    Args:
        turns: in order.
        kept_all: whether every variant starts once, and not whenever its turn comes again.
    """
    if kept_all:
        names = list(dict.fromkeys(name for name, _ in turns))
    else:
        names = [name for name, _ in itertools.groupby(name for name, _ in turns)]
    return [*turns, *((name, START) for name in names[1:])]


def started_line(variant: str, info: EngineInfo) -> str:
    """What to say of an engine that is up."""
    return f"{variant}: up after {info.startup_s:.0f} s, {info.peak_memory_bytes / 2**30:.1f} GiB"
