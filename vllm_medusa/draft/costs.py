"""What a step costs by requests, tokens and forks, in the shape that the budget reads."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from vllm_medusa.draft.types import Floats, Ints
from vllm_medusa.errors import UserError

#: Batch sizes whose curves are kept.
_MAX_CURVES = 256
#: Steps have all numbers of tokens up to 4, and of larger ones two between two powers of two.
#: Kernels work on blocks of rows. On a CPU vLLM keeps the kernels of 32 numbers of tokens for each
#: weight (``model_executor/layers/utils.py``, `create_onednn_mm`), those of prompts among them, and
#: makes others anew.
_SIZES_BITS = 2


class CostCurve:
    """Milliseconds of a step, interpolated between measured points.

    A step costs what one of the next larger size costs (`step_sizes`), so that drafts fill a size.
    Between two measured numbers of requests, the cost for a number of drafts is interpolated.
    Outside of them, the same number of tokens costs the same. A curve continues with its last
    slope, or level. More tokens can cost less: where they fill the blocks of a kernel better.

    Args:
        points: by number of requests, the measured ``(tokens, ms)`` of its steps,
            drafts among the tokens.
        fork_ms: additional cost of each path of a request except the first. On vLLM's V1
            runner it is a pseudo-sequence that reads the request's context once more.
        heads: measured ``(requests, ms)`` of running the heads; empty if they cost nothing.

    Raises:
        UserError: if there are no points, or if one is not positive.

    """

    def __init__(
        self,
        points: Mapping[int, Sequence[tuple[int, float]]],
        *,
        fork_ms: float = 0.0,
        heads: Sequence[tuple[int, float]] = (),
    ) -> None:
        curves = {size: np.array(sorted(points[size]), dtype=np.float64) for size in sorted(points)}
        self._heads = np.array(sorted(heads), dtype=np.float64).reshape(-1, 2)
        if (
            not curves
            or any(not (curve.size and _all_positive(curve)) for curve in curves.values())
            or not _all_positive(self._heads)
            or not (math.isfinite(fork_ms) and fork_ms >= 0)
        ):
            raise UserError(
                "the step costs must have for some number of requests at least one point of a "
                "positive number of tokens and a positive time; measure them again"
            )
        self._sizes = list(curves)
        self._curves = list(curves.values())
        self.fork_ms = fork_ms
        self._table = lru_cache(_MAX_CURVES)(self._make_table)

    def __str__(self) -> str:
        """Name a few costs, for a line of a log."""
        curve = self._curves[0]
        shown = curve[[0, len(curve) // 2, -1]]
        steps = ", ".join(f"{tokens:.0f} tokens {ms:.1f} ms" for tokens, ms in shown.tolist())
        return f"{steps}, heads {self.heads_ms(1):.1f} ms"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `from_dict` is the inverse."""
        points = zip(map(str, self._sizes), (curve.tolist() for curve in self._curves), strict=True)
        return {"points": dict(points), "fork_ms": self.fork_ms, "heads": self._heads.tolist()}

    @classmethod
    def from_dict(cls, values: Any) -> CostCurve:
        """Read what `to_dict` made.

        Raises:
            UserError: it does not have this form.

        """
        try:
            points = {
                int(size): [(int(tokens), float(ms)) for tokens, ms in curve]
                for size, curve in values["points"].items()
            }
            fork_ms = float(values["fork_ms"])
            heads = [(int(requests), float(ms)) for requests, ms in values["heads"]]
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"the step costs are damaged ({error!r}); measure again") from None
        return cls(points, fork_ms=fork_ms, heads=heads)

    def by_drafts(self, num_requests: int, max_drafts: int) -> Floats:
        """Return [max_drafts + 1]: the time of a step by its drafts, without forks and heads."""
        # Rounded up, so that few tables are made.
        return self._table(num_requests, -(-max_drafts // 64) * 64)[: max_drafts + 1]

    def heads_ms(self, num_requests: int) -> float:
        """Return the milliseconds of running the heads for a number of requests."""
        return float(_curve_at(self._heads, np.array(num_requests))) if len(self._heads) else 0.0

    def _make_table(self, num_requests: int, max_drafts: int) -> Floats:
        drafts = np.arange(max_drafts + 1)
        sizes = self._sizes
        if not sizes[0] < num_requests < sizes[-1]:
            nearest = self._curves[0 if num_requests <= sizes[0] else -1]
            return _curve_at(nearest, step_sizes(num_requests + drafts))
        high = bisect_left(sizes, num_requests)
        low = high - 1
        share = (num_requests - sizes[low]) / (sizes[high] - sizes[low])
        # The size is that of the step, not of the measured ones.
        drafts = step_sizes(num_requests + drafts) - num_requests
        ms: Floats = (1 - share) * _curve_at(self._curves[low], sizes[low] + drafts)
        return ms + share * _curve_at(self._curves[high], sizes[high] + drafts)


def _all_positive(numbers: Floats) -> bool:
    return bool((np.isfinite(numbers) & (numbers > 0)).all())


def step_sizes(tokens: Ints) -> Ints:
    """Return the smallest sizes of steps that hold numbers of tokens."""
    _, num_bits = np.frexp(tokens - 1)
    blocks: Ints = np.left_shift(1, np.maximum(0, num_bits - _SIZES_BITS))
    sizes: Ints = -(-tokens // blocks) * blocks
    return sizes


def _curve_at(curve: Floats, tokens: Ints) -> Floats:
    """Evaluate a curve [points, 2] at numbers of tokens; after its end with its last slope."""
    x, y = curve[:, 0], curve[:, 1]
    slope = max(0.0, (y[-1] - y[-2]) / (x[-1] - x[-2])) if len(x) > 1 else 0.0
    ms: Floats = np.interp(tokens, x, y) + slope * np.maximum(0, tokens - x[-1])
    return ms
