"""When to run the heads, and when to draft although nothing seems to pay.

What the heads bring is known only after they ran. So by batch size it is remembered what they
brought of late, and while that is less than they cost they run now and then only; the longer it
has been so, the rarer.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Steps in which the heads run at first, whatever they bring.
_TRIAL_STEPS = 32
#: Weight of the newest step in what is remembered.
_NEWEST = 0.05
#: The same of a step that came after a pause.
_NEWEST_AFTER_PAUSE = 0.5
_SHORTEST_PAUSE = 16
_LONGEST_PAUSE = 256


@dataclass
class _Pace:
    """Of one range of batch sizes."""

    gain: float = 1.0
    num_heads_steps: int = 0
    pause: int = _SHORTEST_PAUSE
    paused: int = 0
    num_empty: int = 0
    patience: int = _SHORTEST_PAUSE


class Pacer:
    """Decides from step to step; one for an engine."""

    def __init__(self) -> None:
        # By powers of two: few, and a batch size has some experience soon.
        self._paces: dict[int, _Pace] = {}

    def runs_heads(self, num_requests: int) -> bool:
        """Whether the heads are to run in a step; call it once for each."""
        pace = self._pace(num_requests)
        if pace.num_heads_steps < _TRIAL_STEPS or pace.gain >= 1 or pace.paused >= pace.pause:
            return True
        pace.paused += 1
        return False

    def record_gain(self, num_requests: int, gain: float) -> None:
        """Remember a step in which the heads ran.

        Args:
            num_requests: that drafted.
            gain: tokens per time, heads included, over those without them.

        """
        pace = self._pace(num_requests)
        came_after_pause = pace.paused > 0
        newest = _NEWEST_AFTER_PAUSE if came_after_pause else _NEWEST
        pace.gain += newest * (gain - pace.gain)
        pace.num_heads_steps += 1
        pace.paused = 0
        if pace.gain >= 1:
            pace.pause = _SHORTEST_PAUSE
        elif came_after_pause:
            pace.pause = min(2 * pace.pause, _LONGEST_PAUSE)

    def drafts_anyway(self, num_requests: int, num_nodes: int) -> bool:
        """Whether to draft although the best is not to; call it once for each step.

        Only what is drafted shows how often deeper nodes are right.

        Args:
            num_requests: that could draft.
            num_nodes: that pay.

        """
        pace = self._pace(num_requests)
        if num_nodes:
            pace.num_empty, pace.patience = 0, _SHORTEST_PAUSE
            return False
        pace.num_empty += 1
        if pace.num_empty < pace.patience:
            return False
        pace.num_empty, pace.patience = 0, min(2 * pace.patience, _LONGEST_PAUSE)
        return True

    def _pace(self, num_requests: int) -> _Pace:
        return self._paces.setdefault(num_requests.bit_length(), _Pace())
