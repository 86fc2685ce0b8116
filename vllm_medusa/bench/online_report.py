"""Figures, table and picture of an online comparison."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.online import Load, OnlineMeasurement
from vllm_medusa.bench.spread import Spread, ratios, spread
from vllm_medusa.bench.variants import BASELINE
from vllm_medusa.reporting.plots import new_figure, save_figure
from vllm_medusa.reporting.tables import Table


@dataclass(frozen=True, kw_only=True)
class OnlineFigures:
    """What one variant gave under one load; every figure with its spread over rounds.

    Attributes:
        variant: its name.
        load: what the load generator did, in words.
        requests_per_s: requests completed per second.
        tokens_per_s: tokens written per second.
        latency_ratio: the baseline's median time of a whole request over the variant's, in the
            same round.
        tokens_per_step: that a request gets in a step with drafts.
        ttft_ms: each round's median time to first token.
        ttft_p99_ms: each round's 99th percentile of it.
        tpot_ms: each round's median time per output token after the first.
        tpot_p99_ms: each round's 99th percentile of it.
        e2e_ms: each round's median time of a whole request.
        acceptance_by_depth: share of drafts whose token at depth 1, 2, ... was accepted.
        num_failed: requests that failed, of all rounds.
        num_preemptions: of all rounds.
        peak_memory_bytes: largest resident memory of the server's processes up to then.
    """

    variant: str
    load: str
    requests_per_s: Spread
    tokens_per_s: Spread
    latency_ratio: Spread | None
    tokens_per_step: Spread
    ttft_ms: Spread
    ttft_p99_ms: Spread
    tpot_ms: Spread
    tpot_p99_ms: Spread
    e2e_ms: Spread
    acceptance_by_depth: tuple[float, ...]
    num_failed: int
    num_preemptions: int
    peak_memory_bytes: int


def online_figures_of(measurements: Sequence[OnlineMeasurement]) -> list[OnlineFigures]:
    """Sum up by variant and load, in order of the loads' first appearance."""
    groups: dict[tuple[Load, str], list[OnlineMeasurement]] = defaultdict(list)
    for measurement in measurements:
        groups[measurement.load, measurement.variant].append(measurement)
    loads = list(dict.fromkeys(load for load, _ in groups))
    return [
        _figures(group, groups.get((load, BASELINE), []))
        for (load, _), group in sorted(groups.items(), key=lambda item: loads.index(item[0][0]))
    ]


def _figures(
    group: Sequence[OnlineMeasurement], baseline: Sequence[OnlineMeasurement]
) -> OnlineFigures:
    def result(name: str) -> Spread:
        return _spread([measurement.result.get(name, 0.0) for measurement in group])

    def latency(of: Sequence[OnlineMeasurement]) -> dict[int, float]:
        return {measurement.round: measurement.result["median_e2el_ms"] for measurement in of}

    first = group[0]
    slower = {number: 1 / value for number, value in latency(group).items() if value}
    base = {number: 1 / value for number, value in latency(baseline).items() if value}
    return OnlineFigures(
        variant=first.variant,
        load=str(first.load),
        requests_per_s=result("request_throughput"),
        tokens_per_s=result("output_throughput"),
        latency_ratio=None if first.variant == BASELINE else spread(ratios(slower, base)),
        tokens_per_step=_spread([measurement.tokens_per_step for measurement in group]),
        ttft_ms=result("median_ttft_ms"),
        ttft_p99_ms=result("p99_ttft_ms"),
        tpot_ms=result("median_tpot_ms"),
        tpot_p99_ms=result("p99_tpot_ms"),
        e2e_ms=result("median_e2el_ms"),
        acceptance_by_depth=_acceptance(group),
        num_failed=sum(int(measurement.result.get("failed", 0)) for measurement in group),
        num_preemptions=int(
            sum(measurement.metrics.get("vllm:num_preemptions", 0) for measurement in group)
        ),
        peak_memory_bytes=max(measurement.peak_memory_bytes for measurement in group),
    )


def _acceptance(group: Sequence[OnlineMeasurement]) -> tuple[float, ...]:
    name = "vllm:spec_decode_num_accepted_tokens_per_pos"
    drafts = sum(measurement.metrics.get("vllm:spec_decode_num_drafts", 0) for measurement in group)

    def accepted(depth: int) -> float:
        return sum(measurement.metrics.get(f"{name}/{depth}", 0) for measurement in group)

    counts = itertools.takewhile(bool, map(accepted, itertools.count()))
    return tuple(count / drafts for count in counts)


def online_table(figures: Sequence[OnlineFigures], states: Mapping[str, VariantState]) -> Table:
    """Every figure by load and variant."""
    table = Table(
        "Serving: median of the rounds (first to third quartile); times of a round are medians",
        (
            "variant",
            "load",
            "requests/s",
            "tokens/s",
            "latency ms",
            "baseline's over it",
            "TTFT ms",
            "TTFT p99",
            "TPOT ms",
            "TPOT p99",
            "tokens/step",
            "failed",
            "memory GiB",
            "start-up s",
        ),
        texts=("variant", "load"),
    )
    for figure in figures:
        starts = sorted(info.startup_s for info in states[figure.variant].starts)
        table.rows.append(
            (
                figure.variant,
                figure.load,
                f"{figure.requests_per_s.median:.2f}",
                f"{figure.tokens_per_s.median:.1f}",
                f"{figure.e2e_ms.median:.0f}",
                "" if figure.latency_ratio is None else figure.latency_ratio.format(2),
                f"{figure.ttft_ms.median:.1f}",
                f"{figure.ttft_p99_ms.median:.1f}",
                f"{figure.tpot_ms.median:.2f}",
                f"{figure.tpot_p99_ms.median:.2f}",
                f"{figure.tokens_per_step.median:.2f}",
                str(figure.num_failed),
                f"{figure.peak_memory_bytes / 2**30:.2f}",
                f"{starts[len(starts) // 2]:.1f}" if starts else "",
            )
        )
    return table


def plot_online(out: Path, figures: Sequence[OnlineFigures]) -> list[tuple[str, str]]:
    """Draw latency against throughput; return file name and caption."""
    labels = ("tokens per second, of all requests", "median time of a request, s")
    figure, (axes,) = new_figure(labels)
    by_variant: dict[str, list[OnlineFigures]] = defaultdict(list)
    for row in figures:
        by_variant[row.variant].append(row)
    for name, rows in by_variant.items():
        throughput = [row.tokens_per_s.median for row in rows]
        latency = [row.e2e_ms.median / 1000 for row in rows]
        axes.plot(throughput, latency, marker="o", linewidth=0.8, label=name)
        for row, *at in zip(rows, throughput, latency, strict=True):
            axes.annotate(row.load, at, (4, 4), textcoords="offset points", size=7)
    axes.set_ylim(bottom=0)
    return [save_figure(figure, out / "latency_by_throughput.png", "Latency against throughput")]


def _spread(values: Sequence[float]) -> Spread:
    found = spread(values)
    assert found is not None
    return found
