"""What steps take beside the costs that were measured, learnt while serving.

The measured costs are those of the model and the heads. A step also schedules, prepares its inputs,
reads the cache, samples and plans its trees. This is there without drafts too, so the larger it is,
the more drafts pay. With forks there is more of it, and the more it is, the less forks pay.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Least weight of the newest step in the means.
_NEWEST = 0.05
#: Most time beside the expected one that counts, as a share of it: now and then something else
#: delays a step.
_MOST = 0.5
#: What is left of the time for forks with each step without them: what is not tried is forgotten,
#: so that it is tried again.
_KEPT = 0.995


@dataclass
class _Means:
    """Means of one range of batch sizes, and how many steps they are of."""

    plain_ms: float = 0.0
    num_plain: int = 0
    forking_ms: float = 0.0
    num_forking: int = 0


class Overhead:
    """The mean times beside the expected ones, by ranges of batch sizes."""

    def __init__(self) -> None:
        # By powers of two, as those of `pacing`.
        self._ranges: dict[int, _Means] = {}

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
        means = self._ranges.setdefault(num_requests.bit_length(), _Means())
        beside_ms = min(max(0.0, ms - expected_ms), _MOST * expected_ms)
        if has_forks:
            means.num_forking += 1
            newest = max(_NEWEST, 1 / means.num_forking)
            more_ms = max(0.0, beside_ms - means.plain_ms)
            means.forking_ms += newest * (more_ms - means.forking_ms)
        else:
            means.num_plain += 1
            newest = max(_NEWEST, 1 / means.num_plain)
            means.plain_ms += newest * (beside_ms - means.plain_ms)
            means.forking_ms *= _KEPT

    def plain_ms(self, num_requests: int) -> float:
        """Return the time beside the expected one of a step without forks; 0 if not known."""
        return self._ranges.get(num_requests.bit_length(), _UNKNOWN).plain_ms

    def forking_ms(self, num_requests: int) -> float:
        """Return how much more it is with forks."""
        return self._ranges.get(num_requests.bit_length(), _UNKNOWN).forking_ms


_UNKNOWN = _Means()
