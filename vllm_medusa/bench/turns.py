"""Variants take turns: the loop that the offline and the online comparison share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from vllm_medusa.bench.display import Display
from vllm_medusa.bench.engines import E, EnginePool
from vllm_medusa.bench.variants import BASELINE
from vllm_medusa.engines.process import EngineProcessError

L = TypeVar("L")


def schedule(
    rounds: Mapping[L, int], names: Sequence[str], keeps_all: bool
) -> Iterator[tuple[int, L, str]]:
    """Turns as (round, load, variant), rounds counted from 1; each load has its number of them.

    If all engines are alive, the variants take turns under every load. If one is alive at a time,
    each variant has all loads of a round in one turn, because every start takes long.
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
    measure: Callable[[E, str, L, int], object],
    display: Display,
) -> None:
    """Measure every variant under every load, in rounds.

    Args:
        pool: the engines; its variants in order, the baseline first.
        rounds: number of rounds by load, such as a batch size.
        unavailable: reasons by the names of variants that are known not to run here.
        measure: takes engine, variant, load and round.
        display: shows every turn; the results are given to it elsewhere.

    Raises:
        EngineProcessError: the baseline does not run.
    """
    for name, reason in unavailable.items():
        pool.states[name].unavailable = reason
        display.dropped(name, reason)
    display.turn_of(BASELINE)
    pool.require(BASELINE)
    turns = list(schedule(rounds, list(pool.states), pool.keeps_all))
    display.expect(name for _, _, name in turns if pool.states[name].is_running)
    for number, load, name in turns:
        if not pool.states[name].is_running:
            continue
        display.turn_of(name)
        try:
            measure(pool.require(name), name, load, number)
        except EngineProcessError as exc:
            if name == BASELINE:
                raise
            pool.give_up(name, exc)
            display.dropped(name, exc.reason)
