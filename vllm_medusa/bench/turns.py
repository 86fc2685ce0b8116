"""Variants take turns: the loop that the offline and the online comparison share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from vllm_medusa.bench.engines import E, EnginePool, VariantState
from vllm_medusa.bench.variants import BASELINE
from vllm_medusa.engines.engine import EngineInfo, EngineProcessError

L = TypeVar("L")
L_contra = TypeVar("L_contra", contravariant=True)
M = TypeVar("M")
M_contra = TypeVar("M_contra", contravariant=True)


class Watcher(Protocol[L_contra, M_contra]):
    """Is told what happens while it happens."""

    def expect(
        self,
        turns: Sequence[tuple[str, L_contra]],
        states: Mapping[str, VariantState],
        kept_all: bool,
    ) -> None:
        """The baseline is up; turns to come, as variant and load, starts left out."""

    def turn_of(self, variant: str) -> None:
        """A variant's turn begins."""

    def started(self, variant: str, info: EngineInfo) -> None:
        """A variant's engine is up."""

    def measured(self, measurement: M_contra) -> None:
        """A turn has ended."""

    def dropped(self, variant: str, reason: str) -> None:
        """A variant takes no part any more."""


def schedule(
    rounds: Mapping[L, int], names: Sequence[str], keeps_all: bool
) -> Iterator[tuple[int, L, str]]:
    """Turns as (round, load, variant), rounds counted from 1; each load has its number of them.

    With all engines alive the variants take turns under every load. One at a time they do so round
    by round, each with all loads, as every start takes long.
    """
    for number in range(1, max(rounds.values()) + 1):
        loads = [load for load, count in rounds.items() if number <= count]
        if keeps_all:
            yield from ((number, load, name) for load in loads for name in names)
        else:
            yield from ((number, load, name) for name in names for load in loads)


def take_turns(
    pool: EnginePool[E],
    rounds: Mapping[L, int],
    unavailable: Mapping[str, str],
    measure: Callable[[E, str, L, int], M],
    watcher: Watcher[L, M],
) -> list[M]:
    """Measure every variant under every load, in rounds.

    Args:
        pool: of the engines; its variants in order, the baseline first.
        rounds: how many, by load, such as a batch size.
        unavailable: reasons by the names of variants that are known not to run here.
        measure: takes engine, variant, load and round.
        watcher: is told of every turn.

    Raises:
        EngineProcessError: the baseline does not run.
    """
    for name, reason in unavailable.items():
        pool.states[name].unavailable = reason
        watcher.dropped(name, reason)
    watcher.turn_of(BASELINE)
    pool.require(BASELINE)
    turns = list(schedule(rounds, list(pool.states), pool.keeps_all))
    expected = [(name, load) for _, load, name in turns if pool.states[name].is_running]
    watcher.expect(expected, pool.states, pool.keeps_all)
    measurements = []
    for number, load, name in turns:
        if not pool.states[name].is_running:
            continue
        watcher.turn_of(name)
        try:
            engine = pool.require(name)
            measurements.append(measure(engine, name, load, number))
        except EngineProcessError as exc:
            if name == BASELINE:
                raise
            pool.give_up(name, exc)
            watcher.dropped(name, exc.reason)
        else:
            watcher.measured(measurements[-1])
    return measurements
