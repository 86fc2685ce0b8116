"""From measurements to figures: medians, spreads, ratios in rounds, by load and by category."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_medusa.bench.spread import Spread, ratios, spread
from vllm_medusa.bench.variants import BASELINE


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One turn of a variant under a load.

    Attributes:
        variant: its name.
        load: batch size, or what the load generator did.
        round: number of the round, from 1.
        speed: compared with the baseline's of the same round; 0 if there is none.
        samples: measured values by name of figure: one, or one for each step or request.
        num_drafts: request steps that verified drafts.
        accepted_by_depth: draft tokens accepted at depth 1, 2, ...
        totals: counts that are summed over rounds.
        peaks: largest memory so far, in bytes; None if there is no such memory.
        summary: the result in a few words.
        line: its line in ``results.jsonl``.
    """

    variant: str
    load: Any
    round: int
    speed: float
    samples: Mapping[str, Sequence[float]]
    num_drafts: int
    accepted_by_depth: Sequence[float]
    totals: Mapping[str, int]
    peaks: Mapping[str, int | None]
    summary: str
    line: Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A figure in tables.

    Attributes:
        name: in the files.
        heading: in tables.
        digits: number of decimals.
        has_spread: whether the quartiles are shown.
    """

    name: str
    heading: str
    digits: int
    has_spread: bool = False


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The figures of one mode of `bench`.

    Attributes:
        name: of the mode.
        title: of their table.
        load: name of the load in the files, and heading of its column.
        ratio: name of the figure that compares speeds.
        columns: the figures.
        totals: names of counts, with their headings.
        alive: the report's sentence if all engines were alive at once, and if only one was.
    """

    name: str
    title: str
    load: tuple[str, str]
    ratio: str
    columns: Sequence[Column]
    totals: Sequence[tuple[str, str]]
    alive: tuple[str, str]


OFFLINE = Kind(
    name="offline",
    title="Speed: median (first to third quartile)",
    load=("batch_size", "batch"),
    ratio="speedup",
    columns=(
        Column("tokens_per_s", "tokens/s", 1),
        Column("speedup", "over baseline", 2, has_spread=True),
        Column("tokens_per_step", "tokens/step", 2),
        Column("num_steps", "steps", 0),
        Column("step_ms", "step ms", 2, has_spread=True),
        Column("ttft_ms", "TTFT ms", 1),
        Column("tpot_ms", "TPOT ms", 2, has_spread=True),
    ),
    totals=(),
    alive=(
        "All engines were alive at once and took turns at every batch.",
        "One engine was alive at a time and started again for every round, with a warm-up.",
    ),
)
ONLINE = Kind(
    name="online",
    title="Serving: median of the rounds (first to third quartile); times of a round are medians",
    load=("load", "load"),
    ratio="latency_ratio",
    columns=(
        Column("requests_per_s", "requests/s", 2),
        Column("tokens_per_s", "tokens/s", 1),
        Column("e2e_ms", "latency ms", 0),
        Column("latency_ratio", "baseline's over it", 2, has_spread=True),
        Column("ttft_ms", "TTFT ms", 1),
        Column("ttft_p99_ms", "TTFT p99", 1),
        Column("tpot_ms", "TPOT ms", 2),
        Column("tpot_p99_ms", "TPOT p99", 2),
        Column("tokens_per_step", "tokens/step", 2),
    ),
    totals=(("num_failed", "failed"),),
    alive=(
        "All servers were alive at once; one was driven at a time.",
        "One server was alive at a time and started again for every round.",
    ),
)
KINDS = {kind.name: kind for kind in (OFFLINE, ONLINE)}


@dataclass(frozen=True)
class Figures:
    """Figures of one variant under one load, each with its spread over rounds.

    Attributes:
        variant: its name.
        load: batch size, or what the load generator did in words.
        spreads: by name of the kind's columns; quartiles are those of all steps or requests, and
            the values each round's median.
        acceptance_by_depth: share of drafts whose token at depth 1, 2, ... was accepted.
        totals: counts of all rounds.
        peaks: largest memory so far, in bytes.
    """

    variant: str
    load: int | str
    spreads: Mapping[str, Spread | None]
    acceptance_by_depth: tuple[float, ...]
    totals: Mapping[str, int]
    peaks: Mapping[str, int | None]

    def median(self, name: str) -> float:
        """A figure's median; 0 if there is none."""
        found = self.spreads[name]
        return found.median if found else 0.0

    def to_json(self, kind: Kind) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {
            "variant": self.variant,
            kind.load[0]: self.load,
            **{name: found and asdict(found) for name, found in self.spreads.items()},
            "acceptance_by_depth": self.acceptance_by_depth,
            **self.totals,
            **self.peaks,
        }


def load_name(load: object) -> str:
    """A load in words."""
    return f"batch {load}" if isinstance(load, int) else str(load)


def figures_of(measurements: Sequence[Measurement], kind: Kind) -> list[Figures]:
    """Summarise by load and variant, in order of first appearance."""
    groups: dict[tuple[Any, str], list[Measurement]] = defaultdict(list)
    for measurement in measurements:
        groups[measurement.load, measurement.variant].append(measurement)
    loads = list(dict.fromkeys(load for load, _ in groups))
    return [
        _figures(group, groups.get((load, BASELINE), []), kind)
        for (load, _), group in sorted(groups.items(), key=lambda item: loads.index(item[0][0]))
    ]


def _figures(group: Sequence[Measurement], baseline: Sequence[Measurement], kind: Kind) -> Figures:
    first = group[0]
    speedups = ratios(_speeds(group), _speeds(baseline))
    spreads = {column.name: _spread(group, column.name) for column in kind.columns}
    spreads[kind.ratio] = None if first.variant == BASELINE else spread(speedups)
    peaks = {name: [m.peaks[name] for m in group] for name in first.peaks}
    return Figures(
        variant=first.variant,
        load=first.load if isinstance(first.load, int) else str(first.load),
        spreads=spreads,
        acceptance_by_depth=_acceptance(group),
        totals={name: sum(m.totals[name] for m in group) for name in first.totals},
        peaks={
            name: max((peak for peak in found if peak is not None), default=None)
            for name, found in peaks.items()
        },
    )


def _speeds(group: Sequence[Measurement]) -> dict[int, float]:
    return {m.round: m.speed for m in group if m.speed}


def _spread(group: Sequence[Measurement], name: str) -> Spread | None:
    """Quartiles of all samples; the values are each measurement's median."""
    samples = [found for m in group if (found := m.samples.get(name))]
    values = tuple(map(statistics.median, samples))
    pooled = spread(list(itertools.chain(*samples)))
    return pooled and Spread(pooled.median, pooled.low, pooled.high, values)


def _acceptance(group: Sequence[Measurement]) -> tuple[float, ...]:
    """Shares by depth, up to the deepest ever accepted (vLLM counts up to the number of drafts)."""
    drafts = sum(measurement.num_drafts for measurement in group)
    depths = itertools.zip_longest(*(m.accepted_by_depth for m in group), fillvalue=0)
    accepted = [sum(counts) for counts in depths]
    while accepted and not accepted[-1]:
        accepted.pop()
    return tuple(count / drafts for count in accepted) if drafts else ()
