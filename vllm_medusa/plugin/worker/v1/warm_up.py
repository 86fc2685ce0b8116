"""Step costs on this machine: measured when an engine first starts, then kept in a file.

This takes a few seconds at most. All tensor-parallel ranks measure the same steps and use the first
rank's times, because ranks with different costs would draft different trees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from vllm.distributed import get_tp_group

from vllm_medusa.draft.costs import CostCurve
from vllm_medusa.plugin.compat import plugin_logger
from vllm_medusa.plugin.worker.v1.cost_file import CostFile
from vllm_medusa.plugin.worker.v1.dynamic import MAX_ROWS

logger = plugin_logger(__name__)

#: A timed task: "step" or "heads", and its number of tokens or requests.
_Task: TypeAlias = tuple[str, int]
#: Tokens of the steps that are timed, the most telling first: a slow model has no time for all.
#: They are among `step_sizes`. Kernels work on blocks of rows: a step of 6 tokens can take less
#: than one of 1.
_SIZES = (1, 16, 6, 32, 64, 128, 3, 12, 96, 48, 24, 8, 4, 2)
#: Numbers of requests with which the heads are timed.
_BATCH_SIZES = (1, 8, 32)
_ROUNDS = 5
#: After this time no other round begins.
_LIMIT_S = 4.0
#: In the first round no other size is timed after this time: the curve continues with its last
#: slope.
_FIRST_ROUND_S = 1.5
#: Cost of each path except the first, as a share of a step of one token: the path reads the
#: request's context once more.
_FORK_SHARE = 0.01


def step_costs(runner: Any) -> CostCurve | None:
    """Return the costs of an earlier start on this machine, else measure them.

    Args:
        runner: a model runner whose KV cache exists and whose trees are dynamic.

    Returns:
        The costs, or None if the settings turn measuring off.

    """
    if not runner.drafter.config.dynamic.measure_costs:
        return None
    file = CostFile.of(runner)
    is_first = get_tp_group().is_first_rank
    # Data-parallel ranks run steps together. If one rank finds a file and another does not, the
    # second would wait for ever.
    is_alone = runner.parallel_config.data_parallel_size == 1
    kept = _agreed_costs(file.read() if is_first and is_alone else None)
    if kept is not None:
        if is_first:
            logger.info("Medusa: step costs of an earlier start, from %s: %s", file.path, kept)
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

    Attention is left out: a step without drafts has its cost too.
    """
    # The heads first: they take little time, and a slow model leaves none for what comes last.
    tasks = {
        **{
            ("heads", size): partial(_heads, runner, size) for size in _within(runner, _BATCH_SIZES)
        },
        **{("step", size): partial(_step, runner, size) for size in _within(runner, _SIZES)},
    }
    ms = _interleaved_ms(runner, tasks, may_end_early)
    points = {
        kind: [(size, value) for (name, size), value in ms.items() if name == kind]
        for kind in ("step", "heads")
    }
    return CostCurve(
        {1: points["step"]}, fork_ms=_FORK_SHARE * points["step"][0][1], heads=points["heads"]
    )


def _within(runner: Any, sizes: Sequence[int]) -> list[int]:
    return [size for size in sizes if size <= runner.max_num_tokens]


def _step(runner: Any, num_tokens: int) -> None:
    hidden, _ = runner._dummy_run(num_tokens)
    runner.model.compute_logits(hidden[:num_tokens])


def _heads(runner: Any, num_requests: int) -> None:
    hidden = torch.zeros(
        num_requests,
        runner.model_config.get_hidden_size(),
        dtype=runner.dtype,
        device=runner.device,
    )
    roots = torch.zeros(num_requests, dtype=torch.int64, device=runner.device)
    prefix = runner.drafter.prefix
    ends = None if prefix is None else prefix.rehearse(hidden, roots)
    runner.drafter.probable_guesses(hidden, roots, ends, max_rows=MAX_ROWS)


def _interleaved_ms(
    runner: Any, tasks: Mapping[_Task, Callable[[], None]], may_end_early: bool
) -> dict[_Task, float]:
    """Time tasks in turns, because the speed of a machine changes; return their milliseconds.

    A task's time is the median of its shares of the rounds' times, times the median round. The
    first round does not count, because everything is slower there. Of each kind of task at least
    the first size is timed.
    """
    begin = time.perf_counter()

    def is_late(limit_s: float) -> bool:
        return may_end_early and _agreed(time.perf_counter() - begin > limit_s)

    kept: list[_Task] = []
    for task, run in tasks.items():
        if task[1] == 1 or not is_late(_FIRST_ROUND_S):
            _timed_ms(runner, run)
            kept.append(task)
    rounds: list[list[float]] = []
    while len(rounds) < _ROUNDS and not (rounds and is_late(_LIMIT_S)):
        rounds.append([_timed_ms(runner, tasks[task]) for task in kept])
    times = np.array(rounds)
    totals = times.sum(axis=1, keepdims=True)
    ms = np.median(times / totals, axis=0) * np.median(totals)
    return dict(zip(kept, ms.tolist(), strict=True))


def _timed_ms(runner: Any, run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    if runner.device.type != "cpu":
        torch.accelerator.synchronize()
    return 1000 * (time.perf_counter() - begin)


def _agreed_costs(costs: CostCurve | None) -> CostCurve | None:
    values = _agreed(costs and costs.to_dict())
    return values and CostCurve.from_dict(values)


def _agreed(value: Any) -> Any:
    """Return the value of the first tensor-parallel rank."""
    return get_tp_group().broadcast_object(value)
