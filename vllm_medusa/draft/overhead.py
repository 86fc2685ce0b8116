"""What steps really take, compared with the costs that were measured; learnt while serving.

The measured costs are those of the model and the heads. A step also schedules, prepares its inputs,
reads the cache, samples and plans its trees, and the machine may be slower than when the costs were
measured. The first is nearly the same for steps of all sizes: the more of it, the more drafts pay.
The second is a factor, which changes nothing. So a line is fitted: time = constant + slope *
expected time. With forks a step takes still more, and the more it is, the less forks pay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from vllm_medusa.draft.types import Floats

_Ms = TypeVar("_Ms", float, Floats)

#: Least weight of the newest step in the means.
_NEWEST = 0.05
#: Most time of a step that counts, as a multiple of the expected one: now and then something else
#: delays a step.
_MOST = 2.0
#: How much steps must differ (standard deviation of the expected times over their mean) for them
#: to say as much about the line as the assumption that it is a factor alone.
_TELLING = 0.1
#: Forks are taken to cost nothing more until about so many steps with them say otherwise: the first
#: one of an engine takes longer than any other.
_TRUST = 8
#: What is left of the time for forks with each step without them: what is not tried is forgotten,
#: so that it is tried again.
_KEPT = 0.995


@dataclass
class _Range:
    """Means of one range of batch sizes, and how many steps they are of.

    The line is through ``(expected_ms, ms)``. It begins as the expected time itself.
    """

    expected_ms: float = 1.0
    ms: float = 1.0
    variance: float = 0.0
    covariance: float = 0.0
    num_plain: int = 0
    forking_ms: float = 0.0
    num_forking: int = 0

    @property
    def slope(self) -> float:
        """Milliseconds for one more that is expected; the constant is never negative."""
        factor = self.ms / self.expected_ms
        prior = (_TELLING * self.expected_ms) ** 2
        slope = (self.covariance + prior * factor) / (self.variance + prior)
        return min(max(slope, 0.0), factor)

    def at(self, expected_ms: _Ms) -> _Ms:
        """Return the line's time."""
        return self.ms + self.slope * (expected_ms - self.expected_ms)

    def record(self, expected_ms: float, ms: float) -> None:
        """Add a step without forks."""
        self.num_plain += 1
        if self.num_plain == 1:
            self.expected_ms, self.ms = expected_ms, ms
            return
        newest = max(_NEWEST, 1 / self.num_plain)
        more, old_ms = expected_ms - self.expected_ms, self.ms
        self.expected_ms += newest * more
        self.ms += newest * (ms - old_ms)
        self.variance = (1 - newest) * (self.variance + newest * more**2)
        self.covariance = (1 - newest) * (self.covariance + newest * more * (ms - old_ms))


class Overhead:
    """Expects what steps take from what their costs say, by ranges of batch sizes."""

    def __init__(self) -> None:
        # By powers of two, as those of `pacing`.
        self._ranges: dict[int, _Range] = {}

    @property
    def is_known(self) -> bool:
        """Whether any step has been recorded."""
        return bool(self._ranges)

    def record(self, num_requests: int, expected_ms: float, ms: float, *, has_forks: bool) -> None:
        """Record a step.

        Args:
            num_requests: of the step.
            expected_ms: by the measured costs.
            ms: that it took.
            has_forks: whether a request ran more than one path.

        """
        found = self._ranges.setdefault(num_requests.bit_length(), _Range())
        ms = min(ms, _MOST * expected_ms)
        if has_forks:
            found.num_forking += 1
            newest = max(_NEWEST, 1 / (found.num_forking + _TRUST))
            more_ms = max(0.0, ms - found.at(expected_ms))
            found.forking_ms += newest * (more_ms - found.forking_ms)
        else:
            found.record(expected_ms, ms)
            found.forking_ms *= _KEPT

    def corrected(self, num_requests: int, ms: Floats) -> Floats:
        """Return what steps without forks take, by what the costs say; if not known, the same."""
        return self._ranges.get(num_requests.bit_length(), _UNKNOWN).at(ms)

    def forking_ms(self, num_requests: int) -> float:
        """Return how much more it is with forks."""
        return self._ranges.get(num_requests.bit_length(), _UNKNOWN).forking_ms


_UNKNOWN = _Range()
