"""How far to run the heads, when to fork, and when to draft although nothing seems to pay.

Heads that run in turn can stop after any level of their tree. What a level brings is known only
after it ran. So the rates of stopping earlier are kept for each range of batch sizes, and the best
number of levels is run; all of them only now and then, to see whether they pay again: the longer
this lasts, the less often. Heads that run at once have one level. What forks cost beside their
nodes is known only after some steps with them and some without (`overhead`), and where they never
pay, the heads need not look for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_medusa.draft.types import Floats

#: Number of first steps in which all levels run.
_TRIAL_STEPS = 32
#: Weight of the newest step in the means.
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
    """The state of one range of batch sizes.

    `rates` are by number of levels, over that of all of them.
    """

    rates: Floats
    num_whole_steps: int = 0
    pause: int = _SHORTEST_PAUSE
    paused: int = 0
    num_empty: int = 0
    patience: int = _SHORTEST_PAUSE
    num_fork_steps: int = 0
    num_plain: int = 0


class Pacer:
    """Decides in each step; each engine has one.

    Args:
        num_levels: of the heads' tree.

    """

    def __init__(self, num_levels: int = 1) -> None:
        self._num_levels = num_levels
        # By powers of two: there are few ranges, so each soon has data.
        self._paces: dict[int, _Pace] = {}

    def levels(self, num_requests: int) -> int:
        """Return the number of levels to run in this step, 0: none; call it once in each step."""
        pace = self._pace(num_requests)
        best = self._best(pace)
        if pace.num_whole_steps < _TRIAL_STEPS or pace.paused >= pace.pause:
            return self._num_levels
        if best < self._num_levels:
            pace.paused += 1
        return best

    def record_rates(self, num_requests: int, rates: Floats) -> None:
        """Record a step in which all levels ran.

        Args:
            num_requests: number of requests that drafted.
            rates: [levels + 1] worth per second by number of levels, the time of the levels
                included.

        """
        pace = self._pace(num_requests)
        came_after_pause = pace.paused > 0
        newest = _NEWEST_AFTER_PAUSE if came_after_pause else _NEWEST
        pace.rates += newest * (rates / rates[-1] - pace.rates)
        pace.num_whole_steps += 1
        pace.paused = 0
        if self._best(pace) == self._num_levels:
            pace.pause = _SHORTEST_PAUSE
        elif came_after_pause:
            pace.pause = min(2 * pace.pause, _LONGEST_PAUSE)

    def _best(self, pace: _Pace) -> int:
        """Return the best number of levels; of equal ones the greatest."""
        return self._num_levels - int(np.argmax(pace.rates[::-1]))

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
        key = num_requests.bit_length()
        if key not in self._paces:
            self._paces[key] = _Pace(np.ones(self._num_levels + 1))
        return self._paces[key]
