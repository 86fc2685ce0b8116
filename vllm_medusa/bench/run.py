"""A whole comparison: settings in, results and report out."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol, TypeVar

from vllm_medusa.bench.display import Display
from vllm_medusa.bench.engines import E, EnginePool
from vllm_medusa.bench.figures import Figures, Kind, Measurement, figures_of, load_name
from vllm_medusa.bench.offline import Offline
from vllm_medusa.bench.online import Online
from vllm_medusa.bench.plan import Plan, make_plan
from vllm_medusa.bench.plots import plot
from vllm_medusa.bench.profile import profile_steps
from vllm_medusa.bench.report import (
    Findings,
    absence_table,
    depth_table,
    speed_table,
    write_report,
)
from vllm_medusa.bench.results import add_line
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.turns import L, take_turns
from vllm_medusa.bench.variants import Variant
from vllm_medusa.engines.engine import EngineInfo
from vllm_medusa.engines.process import EngineProcessError
from vllm_medusa.errors import UserError

M = TypeVar("M", bound=Measurement)


class Mode(Protocol[E, L, M]):
    """A mode of a comparison: offline or online."""

    @property
    def kind(self) -> Kind:
        """Its figures."""

    @property
    def rounds(self) -> Mapping[L, int]:
        """Number of rounds by load."""

    def start(self, variant: Variant) -> E:
        """Start a variant's engine."""

    def warm_up(self, engine: E) -> None:
        """Warm up a running engine."""

    def measure(self, engine: E, variant: str, load: L, number: int) -> M:
        """Measure one turn."""

    def conclude(self, pool: EnginePool[E], measurements: Sequence[M]) -> Findings:
        """Make the rest of the report, while engines are still alive."""


def run(settings: Settings) -> str:
    """Compare, write the results, return what to print.

    Raises:
        UserError: something that the user has to correct; with ``strict``, also differing outputs.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-medusa-bench-") as folder, ends_on_sigterm():
        plan = make_plan(settings, Path(folder))
        try:
            if settings.profile_steps:
                return profile_steps(plan)
            if settings.online:
                return compare(plan, Online(plan, Path(folder)))
            return compare(plan, Offline(plan))
        except EngineProcessError as exc:
            raise UserError(f"the baseline cannot run: {exc.reason}") from None


def compare(plan: Plan, mode: Mode[E, L, M]) -> str:
    """Compare variants in a mode; write the results, return what to print.

    Raises:
        UserError: with ``strict``, outputs that differ.
        EngineProcessError: the baseline does not run.
    """
    kind = mode.kind
    measurements: list[M] = []
    display = Display(lambda: speed_table(figures_of(measurements, kind), pool.states, kind))

    def on_start(name: str, engine: E, info: EngineInfo) -> None:
        display.started(name, info)
        mode.warm_up(engine)

    def measure(engine: E, name: str, load: L, number: int) -> None:
        found = mode.measure(engine, name, load, number)
        measurements.append(found)
        place = {"variant": name, kind.load[0]: load if isinstance(load, int) else str(load)}
        header = {"provenance": plan.provenance_json(pool.states), "settings": plan.settings_json()}
        add_line(plan.settings.out, header, {**place, "round": number, **found.line})
        where = f"round {number}, {load_name(load)}, {name}"
        display.measured(name, f"{where}: {found.summary}")

    by_name = {variant.name: variant for variant in plan.variants}
    with EnginePool(by_name, mode.start, plan.settings.alive, on_start) as pool:
        with display:
            take_turns(pool, mode.rounds, plan.unavailable, measure, display)
        found = mode.conclude(pool, measurements)
    figures = figures_of(measurements, kind)
    printed = write_report(
        plan,
        pool.states,
        [
            speed_table(figures, pool.states, kind),
            absence_table(pool.states),
            depth_table(figures),
            *found.tables,
        ],
        [*plan.prompts.notes, kind.alive[not pool.keeps_all], *_preempted(figures), *found.notes],
        plot(plan.settings.out, figures, kind),
        {
            "mode": kind.name,
            "figures": [row.to_json(kind) for row in figures],
            **found.results,
        },
    )
    if plan.settings.strict and found.complaint:
        display.say(printed)
        raise UserError(found.complaint)
    return printed


def _preempted(figures: Sequence[Figures]) -> list[str]:
    """A note about preempted requests for the report."""
    names = sorted({row.variant for row in figures if row.totals["num_preemptions"]})
    if not names:
        return []
    return [
        f"Requests of {', '.join(names)} were preempted: the KV cache is too small for these "
        "batches, which the times show; give kv_cache_memory_bytes in --llm-options."
    ]


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """In this context SIGTERM raises an exception, so that engines are stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
