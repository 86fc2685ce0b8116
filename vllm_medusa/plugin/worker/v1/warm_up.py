"""What a step costs on this machine: measured when an engine starts for the first time, then kept.

It takes a few seconds at most. All tensor-parallel ranks measure the same steps and take the first
rank's times, because ranks with other costs would draft other trees.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tp_group

from vllm_medusa.draft.costs import CostCurve
from vllm_medusa.plugin.compat import plugin_logger
from vllm_medusa.plugin.worker.v1.cost_file import CostFile

logger = plugin_logger(__name__)

#: Tokens of the steps that are timed.
_SIZES = (1, 2, 3, 5, 9, 17, 33, 65, 129)
_ROUNDS = 3
#: No further size is begun after so long: the curve goes on at its last slope.
_LIMIT_S = 3.0
#: What a path beyond the first costs, as a share of a step of one token: it reads the request's
#: context once more.
_FORK_SHARE = 0.01


def step_costs(runner: Any) -> CostCurve | None:
    """Return the costs of an earlier start on this machine, else measure them.

    Args:
        runner: a model runner whose KV cache exists and whose trees are dynamic.

    Returns:
        The costs, or None if they are not to be measured.

    """
    if not runner.drafter.config.dynamic.measure_costs:
        return None
    file = CostFile.of(runner)
    is_first = get_tp_group().is_first_rank
    # Ranks of data parallelism take part in each other's steps. One that finds a file while another
    # does not would leave that one waiting.
    is_alone = runner.parallel_config.data_parallel_size == 1
    kept = _agreed_costs(file.read() if is_first and is_alone else None)
    if kept is not None:
        if is_first:
            logger.info("Medusa: step costs as measured before, in %s: %s", file.path, kept)
        return kept
    begin = time.perf_counter()
    costs = _agreed_costs(_measure(runner, is_alone))
    assert costs is not None
    if is_first:
        seconds = time.perf_counter() - begin
        where = f", kept in {file.path}" if is_alone and file.write(costs) else ""
        logger.info("Medusa: step costs measured in %.1f s%s: %s", seconds, where, costs)
    return costs


def _measure(runner: Any, may_end_early: bool) -> CostCurve:
    """Time the model's forward pass and its logits, and the heads.

    Attention is left out: what its context costs is paid without drafts too.
    """
    begin = time.perf_counter()
    points = []
    for size in _sizes(runner):
        points.append((size, _median_ms(runner, partial(_step, runner, size))))
        if may_end_early and _agreed(time.perf_counter() - begin > _LIMIT_S):
            break
    hidden = torch.zeros(
        1, runner.model_config.get_hidden_size(), dtype=runner.dtype, device=runner.device
    )
    roots = np.zeros(1, dtype=np.int64)
    heads_ms = _median_ms(runner, partial(runner.drafter.probable_guesses, hidden, roots))
    return CostCurve({1: points}, fork_ms=_FORK_SHARE * points[0][1], heads_ms=heads_ms)


def _sizes(runner: Any) -> Iterator[int]:
    return (size for size in _SIZES if size <= runner.max_num_tokens)


def _step(runner: Any, num_tokens: int) -> None:
    hidden, _ = runner._dummy_run(num_tokens)
    runner.model.compute_logits(hidden[:num_tokens])


def _median_ms(runner: Any, run: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + _ROUNDS):
        begin = time.perf_counter()
        run()
        if runner.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    # The first one of a size is slower.
    return statistics.median(times[1:])


def _agreed_costs(costs: CostCurve | None) -> CostCurve | None:
    values = _agreed(costs and costs.to_dict())
    return values and CostCurve.from_dict(values)


def _agreed(value: Any) -> Any:
    """Return the value of the first tensor-parallel rank."""
    return get_tp_group().broadcast_object(value)
