"""How much a figure depends on the prompts: bootstrap intervals over prompts.

The positions of one text depend on each other, prompts do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUM_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A figure with the 95 % interval of a bootstrap over prompts."""

    value: float
    low: float
    high: float


def resample(num_prompts: int, seed: int) -> NDArray[np.float64]:
    """Return [resamples, prompts]: how often each prompt is drawn."""
    shares = np.full(num_prompts, 1 / num_prompts)
    draws = np.random.default_rng(seed).multinomial(num_prompts, shares, _NUM_RESAMPLES)
    return draws.astype(np.float64)


def by_prompt(counts: NDArray[np.int64], prompt_ids: Sequence[str]) -> NDArray[np.float64]:
    """Return [prompts, 2] the sums of counts [texts, 2] of each prompt, in the order of their ids.

    Args:
        counts: tokens and steps, as `statistics.step_counts` returns.
        prompt_ids: [texts].

    """
    prompts, place = np.unique(prompt_ids, return_inverse=True)
    sums = np.zeros((len(prompts), 2))
    np.add.at(sums, place, counts)
    return sums


def ratio(by_prompt: NDArray[Any], resamples: NDArray[np.float64]) -> Estimate:
    """Return tokens per step with its interval.

    Args:
        by_prompt: [prompts, 2] tokens and steps.
        resamples: as `resample` returns.

    """
    value, resampled = _ratios(by_prompt, resamples)
    return Estimate(value, *np.percentile(resampled, _INTERVAL).tolist())


def difference(
    first: NDArray[Any], second: NDArray[Any], resamples: NDArray[np.float64]
) -> Estimate:
    """Return how many tokens per step the first has more than the second, on the same prompts."""
    a, resampled_a = _ratios(first, resamples)
    b, resampled_b = _ratios(second, resamples)
    return Estimate(a - b, *np.percentile(resampled_a - resampled_b, _INTERVAL).tolist())


def _ratios(
    by_prompt: NDArray[Any], resamples: NDArray[np.float64]
) -> tuple[float, NDArray[np.float64]]:
    """Tokens per step, and that of every resample; 1 without a step."""
    tokens, steps = (resamples @ by_prompt).T
    total_tokens, total_steps = by_prompt.sum(axis=0)
    if not total_steps:
        return 1.0, np.ones(1)
    drawn = steps > 0
    return float(total_tokens / total_steps), tokens[drawn] / steps[drawn]
