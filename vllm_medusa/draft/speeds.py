"""What a token is worth to a request: the steps that it saves.

A request leaves when it has all its tokens. One that emits E tokens per step takes a step less for
E more tokens, so a token of a slow request is worth more than one of a fast request. To count all
tokens alike would serve the fast requests at the cost of the slow ones, which then stay alone.
With the worth 1 / E the mean time of the requests would be the least, and with a high power of it
that of the last one. The square is between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_medusa.draft.types import Floats

#: Power of 1 / E.
_POWER = 2
#: What the steps before the last one still count.
_DECAY = 0.95
#: Number of steps in which a new request is taken to be as fast as the others.
_PRIOR_STEPS = 4.0


@dataclass
class _Speed:
    steps: float = 0.0
    tokens: float = 0.0


class Speeds:
    """The tokens per step of each request of an engine, of late."""

    def __init__(self) -> None:
        self._speeds: dict[str, _Speed] = {}

    def record(self, key: str, num_tokens: int) -> None:
        """Record a step in which a request emitted tokens."""
        speed = self._speeds.setdefault(key, _Speed())
        speed.steps = 1 + _DECAY * speed.steps
        speed.tokens = num_tokens + _DECAY * speed.tokens

    def weights(self, keys: Sequence[str]) -> Floats:
        """Return [B] the worth of a token to each request, compared with one as fast as all."""
        speeds = [self._speeds.get(key, _NEW) for key in keys]
        steps = np.array([speed.steps for speed in speeds])
        tokens = np.array([speed.tokens for speed in speeds])
        if not steps.any():
            return np.ones(len(keys))
        mean = tokens.sum() / steps.sum()
        slowness = mean * (steps + _PRIOR_STEPS) / (tokens + _PRIOR_STEPS * mean)
        weights: Floats = slowness**_POWER
        return weights

    def finish(self, key: str) -> None:
        """Drop the data of a request that has ended."""
        self._speeds.pop(key, None)


_NEW = _Speed()
