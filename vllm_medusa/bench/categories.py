"""Figures by category of the prompts, from batches of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_medusa.bench.figures import Measurement
from vllm_medusa.bench.prompts import BenchPrompt
from vllm_medusa.bench.spread import Spread, spread
from vllm_medusa.bench.variants import BASELINE
from vllm_medusa.engines.engine import Run


@dataclass(frozen=True, kw_only=True)
class BatchMeasurement(Measurement):
    """One batch of prompts on one variant.

    Attributes:
        prompts: the batch.
        run: its measurement.
    """

    prompts: Sequence[BenchPrompt]
    run: Run


@dataclass(frozen=True, kw_only=True)
class CategoryFigures:
    """Figures of one variant on the prompts of one category, all batch sizes together.

    Attributes:
        variant: its name.
        category: of the prompts.
        num_requests: number of requests.
        tokens_per_step: of a request.
        speedup: the baseline's time per output token over the variant's, of the same request.
    """

    variant: str
    category: str
    num_requests: int
    tokens_per_step: Spread | None
    speedup: Spread | None


def categories_of(measurements: Sequence[BatchMeasurement]) -> list[CategoryFigures]:
    """Summarise by variant (without the baseline) and category; empty without categories."""
    steps: dict[tuple[str, str], list[float]] = defaultdict(list)
    speedups: dict[tuple[str, str], list[float]] = defaultdict(list)
    baseline = {(m.load, m.round): m for m in measurements if m.variant == BASELINE}
    for measurement in measurements:
        same = baseline.get((measurement.load, measurement.round))
        for place, prompt in enumerate(measurement.prompts):
            if prompt.category is None or measurement.variant == BASELINE:
                continue
            key = (measurement.variant, prompt.category)
            times = measurement.run.requests[place]
            if times.num_steps > 1:
                num_tokens = len(measurement.run.token_ids[place]) - 1
                steps[key].append(num_tokens / (times.num_steps - 1))
            base_ms = same.run.requests[place].tpot_ms if same else None
            if base_ms and times.tpot_ms:
                speedups[key].append(base_ms / times.tpot_ms)
    return [
        CategoryFigures(
            variant=variant,
            category=category,
            num_requests=len(values),
            tokens_per_step=spread(values),
            speedup=spread(speedups[variant, category]),
        )
        for (variant, category), values in steps.items()
    ]
