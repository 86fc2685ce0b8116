"""Medians, spreads and ratios of figures measured in rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a figure that was measured several times.

    Attributes:
        median: of all values.
        low: their first quartile.
        high: their third quartile.
        values: all of them, in order of the rounds.
    """

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    def format(self, digits: int) -> str:
        """Write it as ``1.52 (1.48 to 1.60)``."""
        if len(self.values) == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread | None:
    """Median and quartiles; None of no values.

    The quartiles are those of the whole population (`statistics.quantiles`, inclusive), so they are
    never outside the values.
    """
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], (values[0],))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, tuple(values))


def ratios(values: dict[int, float], baseline: dict[int, float]) -> list[float]:
    """Each round's value over that of the baseline in the same round.

    Args:
        values: by round.
        baseline: by round; rounds that only one of them has are left out.
    """
    return [values[key] / baseline[key] for key in sorted(values) if baseline.get(key)]
