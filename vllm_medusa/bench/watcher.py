"""Shows the turns of a comparison in the terminal and writes a line for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from vllm_medusa.bench.display import START, Display, started_line, with_starts
from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.results import LINES, LineWriter
from vllm_medusa.engines.engine import EngineInfo
from vllm_medusa.reporting.tables import Table


class Shown(Protocol):
    """A measurement that can be shown in a line."""

    @property
    def variant(self) -> str:
        """Its variant's name."""

    @property
    def round(self) -> int:
        """Number of its round, from 1."""

    @property
    def summary(self) -> str:
        """What it gave, in a few words."""

    @property
    def load_name(self) -> str:
        """Under which load."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON has it."""


S = TypeVar("S", bound=Shown)
L = TypeVar("L")


class ShowingWatcher(Generic[L, S]):
    """The `turns.Watcher` of a run.

    Args:
        plan: of the comparison.
        table: makes the table of all that was measured so far.
        load_name: names a load.
    """

    def __init__(
        self,
        plan: Plan,
        table: Callable[[Sequence[S], Mapping[str, VariantState]], Table],
        load_name: Callable[[L], str],
    ) -> None:
        self._plan = plan
        self._load_name = load_name
        self._states: Mapping[str, VariantState] = {}
        self._lines: LineWriter | None = None
        self._measurements: list[S] = []
        self.display = Display(lambda: table(self._measurements, self._states))

    def expect(
        self, turns: Sequence[tuple[str, L]], states: Mapping[str, VariantState], kept_all: bool
    ) -> None:
        """See `turns.Watcher`."""
        self._states = states
        self._lines = LineWriter(
            self._plan.settings.out / LINES,
            {
                "provenance": self._plan.provenance_json(states),
                "settings": self._plan.settings_json(),
            },
        )
        named = [(name, self._load_name(load)) for name, load in turns]
        self.display.expect(with_starts(named, kept_all))

    def turn_of(self, variant: str) -> None:
        """See `turns.Watcher`."""
        self.display.begin(variant)

    def started(self, variant: str, info: EngineInfo) -> None:
        """See `turns.Watcher`."""
        self.display.done((variant, START), started_line(variant, info))

    def measured(self, measurement: S) -> None:
        """See `turns.Watcher`."""
        self._measurements.append(measurement)
        if self._lines:
            self._lines.add(measurement.to_json())
        turn = (measurement.variant, measurement.load_name)
        where = f"round {measurement.round}, {measurement.load_name}, {measurement.variant}"
        self.display.done(turn, f"{where}: {measurement.summary}")

    def dropped(self, variant: str, reason: str) -> None:
        """See `turns.Watcher`."""
        self.display.drop(variant, reason)
