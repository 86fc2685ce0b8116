"""The engines of a comparison: all alive at once, or one at a time where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import psutil

from vllm_medusa.bench.settings import Alive
from vllm_medusa.bench.variants import Variant
from vllm_medusa.engines.engine import EngineInfo
from vllm_medusa.engines.process import EngineProcessError

#: Memory that must stay free, in engines: compiling takes more memory than running.
_MARGIN = 1


@dataclass
class VariantState:
    """The state of a variant.

    Attributes:
        unavailable: why it could not run, in one line.
        failed: why it ended early, in one line; its earlier measurements stay.
        starts: one entry for each start.
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
        """Why it does not take part, or no longer."""
        return self.unavailable or self.failed


class Engine(Protocol):
    """An engine in other processes, which starts when the object is created."""

    def wait(self) -> EngineInfo:
        """Wait until it has started, or raise `EngineProcessError`."""

    def close(self, patience_s: float = 20) -> None:
        """End it; after this time by force."""


E = TypeVar("E", bound=Engine)


class EnginePool(Generic[E]):
    """Starts engines when they are first asked for; use as a context manager.

    Args:
        variants: by name.
        start: makes a variant's engine.
        alive: keep all alive, or end one before the next one starts; ``auto`` decides when the
            first engine has started.
        on_start: called at each start with the name, the engine and its information.
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
        """Whether all engines are alive at the same time; known after the baseline's start."""
        return self._alive == "all"

    def require(self, name: str) -> E:
        """Return the variant's engine; start it if needed.

        Engines start one after the other: several that compile at once take too much memory.

        Raises:
            EngineProcessError: it does not start.
        """
        if name not in self._engines:
            self._start(name)
        return self._engines[name]

    def give_up(self, name: str, error: EngineProcessError) -> None:
        """Remove a variant whose engine did not start or has failed."""
        state = self.states[name]
        # A variant that has run before has failed; it is not unavailable.
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

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for engine in self._engines.values():
            engine.close(patience_s=20 if error is None else 0)


def has_room(info: EngineInfo, others: int, available: float | None = None) -> bool:
    """Whether this many more engines like this one fit into the free memory.

    On an accelerator the answer is no, because each engine takes its given share of the memory.

    Args:
        info: information on the running engine.
        others: number of other engines.
        available: free memory in bytes; None: this machine's.
    """
    if info.device != "cpu":
        return False
    if available is None:
        available = psutil.virtual_memory().available
    return info.private_memory_bytes * (others + _MARGIN) <= available
