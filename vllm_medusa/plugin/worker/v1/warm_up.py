"""What a step costs on this machine, measured when the engine starts: a few seconds at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vllm_medusa.draft.costs import CostCurve

#: Tokens of the steps that are timed.
_SIZES = (1, 2, 3, 5, 9, 17, 33, 65, 129)
_ROUNDS = 3
#: What a path beyond the first costs, as a share of a step of one token: it reads the request's
#: context once more.
_FORK_SHARE = 0.01


def measure_costs(runner: Any) -> CostCurve:
    """Time the model's forward pass and its logits, and the heads.

    Attention is left out: what its context costs is paid without drafts too. All tensor-parallel
    ranks run the same steps.

    Args:
        runner: a model runner whose KV cache exists.

    """
    most = min(runner.max_num_tokens, _SIZES[-1])
    sizes = [size for size in _SIZES if size <= most]
    _step(runner, sizes[-1])  # the first one warms up
    points = [(size, _median_ms(runner, partial(_step, runner, size))) for size in sizes]
    hidden = torch.zeros(
        1, runner.model_config.get_hidden_size(), dtype=runner.dtype, device=runner.device
    )
    heads_ms = _median_ms(runner, partial(runner.drafter.probable_guesses, hidden))
    return CostCurve({1: points}, fork_ms=_FORK_SHARE * points[0][1], heads_ms=heads_ms)


def _step(runner: Any, num_tokens: int) -> None:
    hidden, _ = runner._dummy_run(num_tokens)
    runner.model.compute_logits(hidden[:num_tokens])


def _median_ms(runner: Any, run: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        run()
        if runner.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)
