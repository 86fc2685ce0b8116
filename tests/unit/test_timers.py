"""Timers of a step's stages, around a runner that only sleeps."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_medusa.plugin.worker import timers
from vllm_medusa.stepcost.stages import _exclusive


class Sleeper:
    """Its methods sleep for so many milliseconds and return what they were given."""

    def __init__(self, **milliseconds: float) -> None:
        for name, ms in milliseconds.items():
            setattr(self, name, lambda value, ms=ms: (time.sleep(ms / 1000), value)[1])


def make_runner(with_forks: bool, *, with_selector: bool = False, with_prefix: bool = False) -> Any:
    runner = Sleeper(_prepare_inputs=1, _model_forward=2)
    layer = SimpleNamespace(impl=Sleeper(forward=1, do_kv_cache_update=1))
    runner.device = torch.device("cpu")
    runner.rejection_sampler = Sleeper(forward=1)
    runner.drafter = Sleeper(propose=1, probable_guesses=1)
    runner.drafter.selector_tree = Sleeper(draft=2, probable=3) if with_selector else None
    runner.drafter.prefix = Sleeper(keep=2, at=3) if with_prefix else None
    runner.tree_drafter = Sleeper(draft=1)
    runner.forks = Sleeper(begin_step=1, commit=1) if with_forks else None
    context = {"layer": layer, "other": SimpleNamespace()}
    runner.compilation_config = SimpleNamespace(static_forward_context=context)

    def execute_model(value: int) -> int:
        for _ in range(2):
            layer.impl.forward(0)
        layer.impl.do_kv_cache_update(0)
        return runner._prepare_inputs(value) + runner._model_forward(0)

    runner.execute_model = execute_model
    return runner


@pytest.mark.parametrize("with_forks", [True, False])
def test_stages_by_step(with_forks: bool) -> None:
    runner = make_runner(with_forks)
    found = timers.StepTimers(runner)
    runner.drafter.propose(0)  # before any step: not counted
    assert runner.execute_model(7) == 7
    assert runner.drafter.propose(5) == 5
    runner.execute_model(1)
    if with_forks:
        runner.forks.commit(0)
    first, second = found.take()
    assert set(first) == {"prepare", "forward", "attention", "write", "heads"}
    assert set(second) == {"prepare", "forward", "attention", "write"} | (
        {"commit"} if with_forks else set()
    )
    assert first["attention"] >= 2.0
    assert first["forward"] >= 2.0
    assert 1.0 <= first["heads"] < 50.0
    runner.execute_model(1)
    runner.tree_drafter.draft(3)
    runner.drafter.probable_guesses(2)
    (last,) = found.take()
    assert last["draft"] >= 1.0
    assert last["heads"] >= 1.0
    assert found.take() == []


def test_selector() -> None:
    runner = make_runner(with_forks=False, with_selector=True)
    found = timers.StepTimers(runner)
    runner.execute_model(0)
    runner.drafter.selector_tree.draft(0)
    runner.execute_model(0)
    runner.drafter.selector_tree.probable(0)
    static, dynamic = found.take()
    assert static["selector"] >= 2.0
    assert dynamic["selector"] >= 3.0


def test_prefix_attention() -> None:
    """What it keeps is a stage of its own."""
    runner = make_runner(with_forks=False, with_prefix=True)
    found = timers.StepTimers(runner)
    runner.execute_model(0)
    runner.drafter.prefix.keep(0)
    (times,) = found.take()
    assert times["prefix"] >= 2.0


def test_parts_of_parts() -> None:
    times = {"draft": 9.0, "heads": 7.0, "selector": 3.0, "forward": 5.0, "attention": 2.0}
    own = _exclusive(times)
    assert (own["draft"], own["heads"], own["selector"]) == (2.0, 4.0, 3.0)
    assert sum(own.values()) == 14.0


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(timers.VARIABLE, raising=False)
    assert not timers.are_wanted()
    monkeypatch.setenv(timers.VARIABLE, "1")
    assert timers.are_wanted()
