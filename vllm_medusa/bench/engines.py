"""The engines of a comparison: all alive at once, or one at a time where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import psutil

from vllm_medusa.bench.settings import Alive
from vllm_medusa.bench.variants import Variant
from vllm_medusa.engines.engine import EngineInfo
from vllm_medusa.engines.process import EngineProcessError

#: Memory that has to be left over, in engines: compiling takes more than running.
_MARGIN = 1


@dataclass
class VariantState:
    """What is known of a variant so far.

    Attributes:
        unavailable: why it could not run at all, in one line.
        failed: why it broke off, in one line; what it measured before stands.
        starts: one entry for each time it was started.
    """

    unavailable: str | None = None
    failed: str | None = None
    starts: list[EngineInfo] = field(default_factory=list)

    @property
    def is_running(self) -> bool:
        """Whether it still takes part."""
        return self.reason is None

    @property
    def reason(self) -> str | None:
        """Why it does not take part (any more)."""
        return self.unavailable or self.failed


class Engine(Protocol):
    """An engine in other processes, starting from its creation on."""

    def wait(self) -> EngineInfo:
        """Wait until it is up, or raise `EngineProcessError`."""

    def close(self, patience_s: float = 20) -> None:
        """End it, which may take so long if nothing is to be forced."""


E = TypeVar("E", bound=Engine)


class EnginePool(Generic[E]):
    """Starts engines when they are first asked for; use as a context manager.

    Args:
        variants: by name.
        start: makes a variant's engine.
        alive: keep all alive, or end one before the next is started; ``auto`` decides when the
            first engine is up.
        on_start: called with the name, the engine and what is known of it whenever one is up.
    """

    def __init__(
        self,
        variants: Mapping[str, Variant],
        start: Callable[[Variant], E],
        alive: Alive,
        on_start: Callable[[str, E, EngineInfo], None],
    ) -> None:
        self._variants = variants
        self._make = start
        self._alive = alive
        self._on_start = on_start
        self._engines: dict[str, E] = {}
        self.states = {name: VariantState() for name in variants}

    @property
    def keeps_all(self) -> bool:
        """Whether all engines are alive at once; known once the baseline has been started."""
        return self._alive == "all"

    def require(self, name: str) -> E:
        """The variant's engine, started if need be.

        Engines start one after the other: several that compile at once take too much memory.

        Raises:
            EngineProcessError: it does not come up.
        """
        if name not in self._engines:
            self._start(name)
        return self._engines[name]

    def give_up(self, name: str, error: EngineProcessError) -> None:
        """Take a variant out whose engine did not come up or broke off."""
        state = self.states[name]
        # One that was up before has failed, not been unavailable.
        if state.starts:
            state.failed = error.reason
        else:
            state.unavailable = error.reason
        self._end(name)

    def _start(self, name: str) -> None:
        if not self.keeps_all:
            for other in list(self._engines):
                self._end(other)
        engine = self._make(self._variants[name])
        self._engines[name] = engine
        info = engine.wait()
        self._on_start(name, engine, info)
        self.states[name].starts.append(info)
        if self._alive == "auto":
            others = sum(state.is_running for state in self.states.values()) - 1
            self._alive = "all" if has_room(info, others) else "one"

    def _end(self, name: str) -> None:
        if name in self._engines:
            self._engines.pop(name).close()

    def __enter__(self) -> EnginePool[E]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for engine in self._engines.values():
            engine.close(patience_s=20 if error is None else 0)


def has_room(info: EngineInfo, others: int, available: float | None = None) -> bool:
    """Whether so many further engines like this one fit into the memory that is left.

    On an accelerator: never, as each engine takes the share of its memory that it is given.

    Args:
        info: of the engine that is up.
        others: number of further engines.
        available: free memory in bytes; None: this machine's.
    """
    if info.device != "cpu":
        return False
    if available is None:
        available = psutil.virtual_memory().available
    return info.private_memory_bytes * (others + _MARGIN) <= available
