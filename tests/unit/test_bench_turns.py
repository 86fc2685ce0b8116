"""Turns, the pool of engines and the time left, with engines that are none."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
from rich.console import Console

from vllm_medusa.bench.display import Display
from vllm_medusa.bench.engines import EnginePool, has_room
from vllm_medusa.bench.offline import rounds_of
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.turns import schedule, take_turns
from vllm_medusa.bench.variants import Variant
from vllm_medusa.engines.engine import EngineInfo
from vllm_medusa.engines.memory import peak_memory, private_memory
from vllm_medusa.engines.process import EngineProcessError
from vllm_medusa.reporting.tables import Table


def test_schedule_interleaves() -> None:
    assert list(schedule({1: 3, 2: 2}, ["A", "B"], keeps_all=True)) == [
        (1, 1, "A"), (1, 1, "B"), (1, 2, "A"), (1, 2, "B"),
        (2, 1, "A"), (2, 1, "B"), (2, 2, "A"), (2, 2, "B"),
        (3, 1, "A"), (3, 1, "B"),
    ]  # fmt: skip
    alone = [name for _, _, name in schedule({1: 2, 2: 2}, ["A", "B"], keeps_all=False)]
    assert alone == ["A", "A", "B", "B"] * 2


def test_small_batches_have_further_rounds() -> None:
    settings = Settings(model="M", batch_sizes=(1, 4, 8), rounds=2, min_prompts=12)
    assert rounds_of(settings) == {1: 12, 4: 3, 8: 2}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_display(is_terminal: bool) -> None:
    table = Table("[title]", ("variant", "tokens/s"))
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120, color_system=None)
    display = Display(lambda: table, console)
    with display:
        display.turn_of("A")
        display.started("A", EngineInfo(12.0, "cpu", None, 2**30, 1))
        display.expect(["A", "B", "A", "B", "C"])
        for number in (1, 2):
            table.rows.append(("A[x]", f"{number}.0"))
            display.measured("A", f"A: {number}.0 tokens/s")
        display.dropped("B", "[none]")
        display.turn_of("C")
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    if is_terminal:  # the table, with nothing read as markup
        for part in ("[title]", "A[x]", "now: C", "2/3 turns"):
            assert part in shown
        return
    up, first, second, dropped = shown.splitlines()
    assert up == "A: up after 12 s, 1.0 GiB"
    assert first == "A: 1.0 tokens/s (turns left: 4)"  # one turn has no rate yet
    assert re.fullmatch(r"A: 2.0 tokens/s \(turns left: 3, about \d+ s\)", second)
    assert dropped.startswith("B: left out: [none] (turns left: 1, about ")


class FakeEngine:
    """Counts itself among the living; named ``broken`` it does not come up."""

    def __init__(self, name: str, living: set[str]) -> None:
        self.name, self.living = name, living
        assert name not in living
        living.add(name)

    def wait(self) -> EngineInfo:
        if self.name == "broken":
            raise EngineProcessError("ValueError: no heads")
        return EngineInfo(1.0, "cpu", None, 100, 100)

    def close(self, patience_s: float = 20) -> None:
        self.living.remove(self.name)


class Recorder:
    """A display that writes down what it is told."""

    def __init__(self) -> None:
        self.dropped_ones: list[tuple[str, str]] = []
        self.expected: list[str] = []

    def expect(self, turns: Any) -> None:
        self.expected = list(turns)

    def turn_of(self, variant: str) -> None: ...

    def dropped(self, variant: str, reason: str) -> None:
        self.dropped_ones.append((variant, reason))


@pytest.mark.parametrize("alive", ["all", "one"])
def test_turns(alive: Any) -> None:
    """One variant does not start, one fails in round 2, one is known to be unavailable."""
    living: set[str] = set()
    names = ("baseline", "broken", "failing", "suffix", "tree")
    display: Any = Recorder()
    measured: list[str] = []
    started: list[str] = []

    def measure(engine: FakeEngine, name: str, load: int, number: int) -> None:
        assert engine.name == name
        assert living == ({"baseline", "failing", "tree"} & living if alive == "all" else {name})
        if (name, number) == ("failing", 2):
            raise EngineProcessError("MemoryError: gone")
        measured.append(f"{number} {name}")

    with EnginePool(
        {name: Variant(name=name) for name in names},
        lambda variant: FakeEngine(variant.name, living),
        alive,
        lambda name, engine, info: started.append(name),
    ) as pool:
        take_turns(pool, {1: 3}, {"suffix": "no package"}, measure, display)
        assert len(living) == (2 if alive == "all" else 1)
    assert living == set()
    assert measured == [
        *("1 baseline", "1 failing", "1 tree"),
        *("2 baseline", "2 tree", "3 baseline", "3 tree"),
    ]
    assert display.dropped_ones == [
        ("suffix", "no package"),
        ("broken", "ValueError: no heads"),
        ("failing", "MemoryError: gone"),
    ]
    assert display.expected == [name for name in names if name != "suffix"] * 3
    states = pool.states
    assert states["suffix"].unavailable == "no package"
    assert states["broken"].unavailable == "ValueError: no heads"
    assert states["failing"].failed == "MemoryError: gone"
    assert states["failing"].unavailable is None
    starts = {name: len(state.starts) for name, state in states.items()}
    times = 1 if alive == "all" else 3
    assert starts == {
        "baseline": times,
        "tree": times,
        "broken": 0,
        "suffix": 0,
        "failing": 1 if alive == "all" else 2,
    }
    assert {name: started.count(name) for name in names} == starts


@pytest.mark.parametrize("number", [1, 2])
def test_without_the_baseline_there_is_nothing(number: int) -> None:
    living: set[str] = set()
    display: Any = Recorder()

    def measure(engine: FakeEngine, name: str, load: int, now: int) -> str:
        if (name, now) == ("baseline", number):
            raise EngineProcessError("ValueError: no")
        return ""

    variants = {name: Variant(name=name) for name in ("baseline", "tree")}
    with (
        pytest.raises(EngineProcessError, match="ValueError: no"),
        EnginePool(
            variants,
            lambda variant: FakeEngine(variant.name, living),
            "all",
            lambda name, engine, info: None,
        ) as pool,
    ):
        take_turns(pool, {1: 3}, {}, measure, display)
    assert living == set()


def test_room_for_engines() -> None:
    info = EngineInfo(1.0, "cpu", None, 5000, 1000)
    assert has_room(info, others=3, available=4000)
    assert not has_room(info, others=3, available=3999)
    assert not has_room(EngineInfo(1.0, "cuda", "GPU", 1, 1), others=1, available=1e12)


def test_memory_of_a_process_and_its_children() -> None:
    program = "import subprocess, sys; held = bytearray(50_000_000); subprocess.run(['cat'])"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        while not psutil.Process(process.pid).children():
            time.sleep(0.05)
        private, peak = private_memory(process.pid), peak_memory(process.pid)
        alone = psutil.Process(process.pid).memory_info().rss
        process.communicate()
    assert 50_000_000 < private < peak
    assert peak > alone  # the child counts
    assert peak_memory(process.pid) == 0  # it has ended
