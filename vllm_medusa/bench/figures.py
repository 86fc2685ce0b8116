"""From measurements to figures: medians, spreads, ratios in rounds, by batch size and category."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_medusa.bench.offline import Measurement
from vllm_medusa.bench.spread import Spread, ratios, spread
from vllm_medusa.bench.variants import BASELINE


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one variant gave at one batch size; every figure with its spread over rounds.

    Attributes:
        variant: its name.
        batch_size: requests at once.
        tokens_per_s: of all requests together.
        speedup: tokens per second over the baseline's in the same round.
        tokens_per_step: that a request gets in a decode step (acceptance length).
        num_steps: engine steps of a round.
        step_ms: time of an engine step while the whole batch decodes; quartiles over all steps.
        ttft_ms: time to first token, of all requests.
        tpot_ms: time per output token after the first, of all requests.
        acceptance_by_depth: share of drafts whose token at depth 1, 2, ... was accepted.
        num_preemptions: of all rounds.
        peak_memory_bytes: largest resident memory of the engine's processes up to then.
        device_memory_bytes: largest reserved on the accelerator up to then; None on a CPU.
    """

    variant: str
    batch_size: int
    tokens_per_s: Spread
    speedup: Spread | None
    tokens_per_step: Spread
    num_steps: Spread
    step_ms: Spread
    ttft_ms: Spread
    tpot_ms: Spread | None
    acceptance_by_depth: tuple[float, ...]
    num_preemptions: int
    peak_memory_bytes: int
    device_memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class CategoryFigures:
    """What one variant gave on the prompts of one category, all batch sizes together.

    Attributes:
        variant: its name.
        category: of the prompts.
        num_requests: how many there were.
        tokens_per_step: of a request.
        speedup: the baseline's time per output token over the variant's, of the same request.
    """

    variant: str
    category: str
    num_requests: int
    tokens_per_step: Spread | None
    speedup: Spread | None


def figures_of(measurements: Sequence[Measurement]) -> list[Figures]:
    """Sum up by variant and batch size, in order of first appearance."""
    groups: dict[tuple[str, int], list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        groups[measurement.variant, measurement.batch_size].append(measurement)
    return [
        _figures(group, groups.get((BASELINE, batch_size), []))
        for (_, batch_size), group in sorted(groups.items(), key=lambda item: item[0][1])
    ]


def categories_of(measurements: Sequence[Measurement]) -> list[CategoryFigures]:
    """Sum up by variant, but the baseline, and category; empty if no prompt names one."""
    steps: dict[tuple[str, str], list[float]] = defaultdict(list)
    speedups: dict[tuple[str, str], list[float]] = defaultdict(list)
    baseline = {
        (measurement.batch_size, measurement.round): measurement
        for measurement in measurements
        if measurement.variant == BASELINE
    }
    for measurement in measurements:
        same = baseline.get((measurement.batch_size, measurement.round))
        for place, prompt in enumerate(measurement.prompts):
            if prompt.category is None:
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
        if variant != BASELINE
    ]


def _figures(group: Sequence[Measurement], baseline: Sequence[Measurement]) -> Figures:
    first = group[0]
    by_round = _by_round(group, lambda measurement: measurement.tokens_per_s)
    requests = [times for measurement in group for times in measurement.run.requests]
    step_ms = _all(measurement.run.decode_step_ms for measurement in group)
    speedups = ratios(by_round, _by_round(baseline, lambda measurement: measurement.tokens_per_s))
    device = [m.run.device_memory_bytes for m in group if m.run.device_memory_bytes is not None]
    return Figures(
        variant=first.variant,
        batch_size=first.batch_size,
        tokens_per_s=_spread(list(by_round.values())),
        speedup=None if first.variant == BASELINE else spread(speedups),
        tokens_per_step=_spread([measurement.run.tokens_per_step for measurement in group]),
        num_steps=_spread([float(len(measurement.run.step_ms)) for measurement in group]),
        step_ms=_spread(step_ms, values=[_median_step(measurement) for measurement in group]),
        ttft_ms=_spread([times.ttft_ms for times in requests]),
        tpot_ms=spread([times.tpot_ms for times in requests if times.tpot_ms is not None]),
        acceptance_by_depth=_acceptance(group),
        num_preemptions=sum(measurement.run.num_preemptions for measurement in group),
        peak_memory_bytes=max(measurement.run.peak_memory_bytes for measurement in group),
        device_memory_bytes=max(device, default=None),
    )


def _acceptance(group: Sequence[Measurement]) -> tuple[float, ...]:
    """Shares by depth, up to the deepest ever accepted (vLLM counts up to the number of drafts)."""
    drafts = sum(measurement.run.num_drafts for measurement in group)
    depths = itertools.zip_longest(
        *(measurement.run.accepted_by_depth for measurement in group), fillvalue=0
    )
    accepted = [sum(counts) for counts in depths]
    while accepted and not accepted[-1]:
        accepted.pop()
    return tuple(count / drafts for count in accepted) if drafts else ()


def _by_round(
    group: Iterable[Measurement], figure: Callable[[Measurement], float]
) -> dict[int, float]:
    return {measurement.round: figure(measurement) for measurement in group}


def _median_step(measurement: Measurement) -> float:
    return statistics.median(measurement.run.decode_step_ms)


def _all(lists: Iterable[Sequence[float]]) -> list[float]:
    return [value for values in lists for value in values]


def _spread(numbers: Sequence[float], values: Sequence[float] | None = None) -> Spread:
    """Spread of numbers that there are; ``values`` stand for them where there are too many."""
    found = spread(numbers)
    assert found is not None
    if values is None:
        return found
    return Spread(found.median, found.low, found.high, tuple(values))


def by_batch_size(figures: Iterable[Figures]) -> Mapping[str, list[Figures]]:
    """The figures of each variant, in order of batch size."""
    variants: dict[str, list[Figures]] = defaultdict(list)
    for figure in figures:
        variants[figure.variant].append(figure)
    return variants
