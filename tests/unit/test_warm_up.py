"""The step costs that are measured at start-up, where steps take long."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from vllm_medusa.plugin.worker.v1 import warm_up

pytestmark = pytest.mark.engine


def test_heads_are_timed_at_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the steps leave out: at a large batch the heads cost several times more."""
    monkeypatch.setattr(warm_up, "_agreed", lambda value: value)
    monkeypatch.setattr(warm_up, "_FIRST_ROUND_S", 0.05)
    monkeypatch.setattr(warm_up, "_LIMIT_S", 0.2)
    monkeypatch.setattr(warm_up, "_step", lambda runner, size: time.sleep(0.03))
    monkeypatch.setattr(warm_up, "_heads", lambda runner, size: time.sleep(size / 10_000))
    runner = SimpleNamespace(max_num_tokens=512, device=torch.device("cpu"))
    costs = warm_up._measure(runner, may_end_early=True)
    assert len(costs.to_dict()["points"]["1"]) < len(warm_up._SIZES)
    assert [size for size, _ in costs.to_dict()["heads"]] == list(warm_up._BATCH_SIZES)
    assert costs.heads_ms(32) > 2 * costs.heads_ms(1)
