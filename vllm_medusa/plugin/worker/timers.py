"""Times of the stages of a step, for ``vllm-medusa bench --profile-steps``.

They are off unless the environment has ``VLLM_MEDUSA_TIMERS=1``. If off, nothing is installed and
no step is slower. Methods of the runner and of its objects are wrapped from outside, so the code of
a step does not contain timers. On a CPU a stage is timed with the host's clock, on an accelerator
with two events on its stream, which are read after the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

VARIABLE = "VLLM_MEDUSA_TIMERS"


def are_wanted() -> bool:
    """Whether the environment asks for timers."""
    return os.environ.get(VARIABLE) == "1"


class StepTimers:
    """Times the stages of a runner's steps.

    Some stages are parts of others, and their time counts in both: the fork plan is part of
    preparing, attention and the K/V writes (also those to forks) are part of the forward pass, the
    heads (with what they read of the prefix) are part of drafting, and the selector is part of the
    heads.

    Args:
        runner: a `MedusaRunnerMixin` whose KV cache exists.

    """

    def __init__(self, runner: Any) -> None:
        self._uses_events = runner.device.type != "cpu"
        self._steps: list[dict[str, list[tuple[Any, Any]]]] = []
        self._wrap(runner, "execute_model", None)
        self._wrap(runner, "_prepare_inputs", "prepare")
        self._wrap(runner, "_model_forward", "forward")
        self._wrap(runner.rejection_sampler, "forward", "sample")
        self._wrap(runner.tree_drafter, "draft", "draft")
        self._wrap(runner.drafter, "propose", "heads")
        self._wrap(runner.drafter, "probable_guesses", "heads")
        if runner.drafter.prefix is not None:
            self._wrap(runner.drafter.prefix, "keep", "prefix")
        if runner.drafter.selector_tree is not None:
            self._wrap(runner.drafter.selector_tree, "draft", "selector")
            self._wrap(runner.drafter.selector_tree, "probable", "selector")
        if runner.forks is not None:
            self._wrap(runner.forks, "begin_step", "plan")
            self._wrap(runner.forks, "commit", "commit")
        for layer in runner.compilation_config.static_forward_context.values():
            if hasattr(layer, "impl"):
                self._wrap(layer.impl, "forward", "attention")
                self._wrap(layer.impl, "do_kv_cache_update", "write")

    def take(self) -> list[dict[str, float]]:
        """Return the milliseconds of each stage, for each step since the last call."""
        if self._uses_events:
            torch.accelerator.synchronize()
        steps, self._steps = self._steps, []
        return [
            {stage: sum(map(self._elapsed_ms, spans)) for stage, spans in step.items()}
            for step in steps
        ]

    def _wrap(self, owner: Any, name: str, stage: str | None) -> None:
        """Time a method; None: its call begins a step."""
        method: Callable[..., Any] = getattr(owner, name)

        def begins_step(*args: Any, **kwargs: Any) -> Any:
            self._steps.append({})
            return method(*args, **kwargs)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            try:
                return method(*args, **kwargs)
            finally:
                if self._steps:
                    self._steps[-1].setdefault(stage or "", []).append((begin, self._now()))

        setattr(owner, name, begins_step if stage is None else timed)

    def _now(self) -> Any:
        if not self._uses_events:
            return time.perf_counter()
        event = torch.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed_ms(self, span: tuple[Any, Any]) -> float:
        begin, end = span
        if not self._uses_events:
            return float(1000 * (end - begin))
        return float(begin.elapsed_time(end))
