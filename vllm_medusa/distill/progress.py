"""A progress bar with the rate in tokens and the time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Shows on standard error how many answers there are; use as a context manager.

    In a log file it writes a line now and then instead of moving.

    Args:
        num_answers: that there will be.
        num_present: of these, made by earlier runs.
    """

    def __init__(self, num_answers: int, num_present: int) -> None:
        self._bar = tqdm(
            total=num_answers,
            initial=num_present,
            unit="answer",
            desc="distill",
            mininterval=0.5 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
            dynamic_ncols=True,
        )
        self._num_tokens = 0
        self._begin: float | None = None

    def report(self, num_answers: int, num_tokens: int) -> None:
        """Add answers that ended and tokens that were made; the first call starts the clock."""
        now = time.monotonic()
        if self._begin is None:
            self._begin = now
            self._bar.unpause()
        self._num_tokens += num_tokens
        if now > self._begin:
            rate = self._num_tokens / (now - self._begin)
            self._bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        self._bar.update(num_answers)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
