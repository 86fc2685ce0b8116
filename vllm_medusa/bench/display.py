"""The display of a running comparison: a table, progress, time left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import rich.console
import rich.text

from vllm_medusa.engines.engine import EngineInfo
from vllm_medusa.reporting.progress import Bar
from vllm_medusa.reporting.tables import Table


class Display(Bar):
    """A live table and a bar on a terminal, else a line for each event; a context manager.

    Args:
        table: builds the table from all that was measured so far.
        console: where to show it; None: standard error.
    """

    def __init__(
        self, table: Callable[[], Table], console: rich.console.Console | None = None
    ) -> None:
        self._table = table
        self._pending: Counter[str] = Counter()
        super().__init__(
            "bench", "turns", 0, above=self._above, writes_lines=False, console=console
        )

    def expect(self, turns: Iterable[str]) -> None:
        """Set the variants whose turns will come."""
        self._pending = Counter(turns)
        self.set_total(self._pending.total())

    def turn_of(self, variant: str) -> None:
        """Show that a variant's turn begins."""
        self.advance(0, f"now: {variant}")

    def started(self, variant: str, info: EngineInfo) -> None:
        """Show that a variant's engine has started."""
        memory = f"{info.peak_memory_bytes / 2**30:.1f} GiB"
        self._tell(f"{variant}: up after {info.startup_s:.0f} s, {memory}")

    def measured(self, variant: str, line: str) -> None:
        """Show that a turn has ended, with its result."""
        self._pending[variant] -= 1
        self.advance(1, line)
        self._tell(line)

    def dropped(self, variant: str, reason: str) -> None:
        """Show that a variant is left out from now on, and why."""
        del self._pending[variant]
        self.set_total(self.done + self._pending.total())
        self._tell(f"{variant}: left out: {reason}")

    def _above(self) -> Iterable[rich.console.RenderableType]:
        table = self._table()
        return (rich.text.Text(table.title), table.rich()) if table.rows else ()

    def _tell(self, line: str) -> None:
        if not self.is_live:
            turns, seconds = self._pending.total(), self.seconds_left
            if turns:
                about = "" if seconds is None else f", about {seconds:.0f} s"
                line += f" (turns left: {turns}{about})"
            self.say(line)
