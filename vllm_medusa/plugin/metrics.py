"""The plugin's counters among vLLM's metrics: ``/metrics`` and ``LLM.get_metrics()``.

A count goes through vLLM's processes like this. A worker counts (`counters.Counters`). The increase
of a step goes to the engine core on that step's ``ModelRunnerOutput``, and from there to the front
end in ``SchedulerStats``, like vLLM's own statistics. There it is added to Prometheus counters with
the names ``vllm:medusa_...``. The message is a dict of integers, and only steps that counted
something have one.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_medusa.plugin.counters import DESCRIPTIONS, OUTPUT_ATTRIBUTE
from vllm_medusa.plugin.identity import medusa_config_of

_PREFIX = "medusa_"


class MedusaStatLogger(AggregateStatLoggerBase):
    """Adds up what `_add_to_stats` put into the ``SchedulerStats``.

    Args:
        prometheus: vLLM's own logger, whose kind of counters (Prometheus or Ray) and labels
            (``model_name``, ``engine``) are used here too. It unregisters all ``vllm:`` metrics of
            an earlier engine, also ours, so it must be created first.

    """

    def __init__(self, prometheus: PrometheusStatLogger) -> None:
        self._counters = {
            _PREFIX + name: create_metric_per_engine(
                prometheus._counter_cls(
                    name=f"vllm:{_PREFIX}{name}",
                    documentation=f"Medusa: {description}",
                    labelnames=["model_name", "engine"],
                ),
                prometheus.per_engine_labelvalues,
            )
            for name, description in DESCRIPTIONS.items()
        }

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take the counts out of a step's statistics, before vLLM's loggers see them."""
        if scheduler_stats is None:
            return
        carrier = scheduler_stats.num_kv_fetch_reqs_by_stage
        for name, counters in self._counters.items():
            if increase := carrier.pop(name, 0):
                counters[engine_idx].inc(increase)

    def log_engine_initialized(self) -> None:
        """Log nothing: the engine core logs the start (`memory`)."""


def wrap_stat_loggers(original: Any) -> Any:
    """Add our logger to an engine's."""

    def initialise(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if medusa_config_of(vllm_config) is not None:
            loggers = self.stat_loggers
            prometheus = next(x for x in loggers if isinstance(x, PrometheusStatLogger))
            loggers.insert(0, MedusaStatLogger(prometheus))

    return initialise


def wrap_prometheus(original: Any) -> Any:
    """Make a counter for each depth of a tree, where vLLM makes one for each draft token."""

    def initialise(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        config = medusa_config_of(vllm_config)
        if config is not None:
            vllm_config = copy.copy(vllm_config)
            vllm_config.speculative_config = copy.copy(vllm_config.speculative_config)
            vllm_config.speculative_config.num_speculative_tokens = config.limits.max_depth
        original(self, vllm_config, *args, **kwargs)

    return initialise


def wrap_update_from_output(original: Any) -> Any:
    """Put our counts into a step's statistics, and remove positions that no path has."""

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = original(self, scheduler_output, model_runner_output)
        if self.log_stats and (max_depth := _max_depth(self)) is not None:
            for output in outputs.values():
                if output.scheduler_stats is not None:
                    _cut_positions(output.scheduler_stats.spec_decoding_stats, max_depth)
            _add_to_stats(outputs, getattr(model_runner_output, OUTPUT_ATTRIBUTE, {}))
        return outputs

    return update_from_output


def _max_depth(scheduler: Any) -> int | None:
    """Return how deep trees may be, None without Medusa; looked up once: this runs every step."""
    if not hasattr(scheduler, "_medusa_max_depth"):
        config = medusa_config_of(scheduler.vllm_config)
        scheduler._medusa_max_depth = None if config is None else config.limits.max_depth
    return scheduler._medusa_max_depth


def _cut_positions(stats: Any, max_depth: int) -> None:
    """Keep only ``max_depth`` positions of a step's ``SpecDecodingStats``.

    vLLM counts accepted tokens by position, with a position for each draft token. It also counts
    drafted tokens by position, but makes no metric of them.
    """
    if stats is not None:
        del stats.num_accepted_tokens_per_pos[max_depth:]
        del stats.num_draft_tokens_per_pos[max_depth:]


def _add_to_stats(outputs: dict[int, Any], increase: dict[str, int]) -> None:
    """Put a step's counts into the ``SchedulerStats`` among its outputs, if there are any.

    Only the declared fields of ``SchedulerStats`` are sent, so a new field would be lost. The field
    ``num_kv_fetch_reqs_by_stage`` is a new dict of integers for each step, of which vLLM reads only
    its own keys.
    """
    for output in outputs.values():
        if output.scheduler_stats is not None:
            output.scheduler_stats.num_kv_fetch_reqs_by_stage.update(
                {_PREFIX + name: count for name, count in increase.items()}
            )
