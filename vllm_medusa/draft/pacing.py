"""When to run the heads, when to fork, and when to draft although nothing seems to pay.

The gain of the heads is known only after they ran. So the recent gain is kept for each range of
batch sizes. While it is below the cost of the heads, they run only now and then: the longer this
lasts, the less often. What forks cost beside their nodes is known only after some steps with them
and some without (`overhead`), and where they never pay, the heads need not look for them.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Number of first steps in which the heads always run.
_TRIAL_STEPS = 32
#: Weight of the newest step in the mean.
_NEWEST = 0.05
#: The same for a step after a pause.
_NEWEST_AFTER_PAUSE = 0.5
_SHORTEST_PAUSE = 16
_LONGEST_PAUSE = 256
#: Number of first steps, every other one of which may not fork.
_FORK_TRIALS = 16
#: After so many steps in a row in which forks did not pay, one in `_FORK_PAUSE` looks for them.
_FORK_PATIENCE = 16
_FORK_PAUSE = 32
#: One step in so many may not fork although forks pay.
_PLAIN_PAUSE = 64


@dataclass
class _Pace:
    """The state of one range of batch sizes."""

    gain: float = 1.0
    num_heads_steps: int = 0
    pause: int = _SHORTEST_PAUSE
    paused: int = 0
    num_empty: int = 0
    patience: int = _SHORTEST_PAUSE
    num_fork_steps: int = 0
    num_plain: int = 0


class Pacer:
    """Decides in each step; each engine has one."""

    def __init__(self) -> None:
        # By powers of two: there are few ranges, so each soon has data.
        self._paces: dict[int, _Pace] = {}

    def runs_heads(self, num_requests: int) -> bool:
        """Whether the heads should run in this step; call it once in each step."""
        pace = self._pace(num_requests)
        if pace.num_heads_steps < _TRIAL_STEPS or pace.gain >= 1 or pace.paused >= pace.pause:
            return True
        pace.paused += 1
        return False

    def record_gain(self, num_requests: int, gain: float) -> None:
        """Record a step in which the heads ran.

        Args:
            num_requests: number of requests that drafted.
            gain: tokens per second, heads included, divided by those without the heads.

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

    def may_fork(self, num_requests: int) -> bool:
        """Whether trees may have forks in this step; call it once in each step."""
        pace = self._pace(num_requests)
        pace.num_fork_steps += 1
        if pace.num_fork_steps <= _FORK_TRIALS:
            return pace.num_fork_steps % 2 == 1
        if pace.num_plain >= _FORK_PATIENCE:
            return pace.num_fork_steps % _FORK_PAUSE == 0
        return pace.num_fork_steps % _PLAIN_PAUSE != 0

    def record_forks(self, num_requests: int, num_forks: int) -> None:
        """Record the forks that pay in a step that may fork."""
        pace = self._pace(num_requests)
        pace.num_plain = 0 if num_forks else pace.num_plain + 1

    def drafts_anyway(self, num_requests: int, num_nodes: int) -> bool:
        """Whether to draft although nothing pays; call it once in each step.

        Only what is drafted shows how often deeper nodes are right.

        Args:
            num_requests: number of requests that could draft.
            num_nodes: number of nodes that pay.

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
