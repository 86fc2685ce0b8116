"""All patched functions of vLLM: where, by what, why, and what would make the patch unnecessary.

Only `apply` patches. `register`, `arguments` and `worker.worker` call it, each for its process. The
modules that are named here are imported only then, so that a process loads no more of vLLM than
without the plugin. Without Medusa in its configuration each wrapper calls vLLM's own code.
``docs/patches.md`` is made from this list and from `overrides`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from vllm_medusa.plugin.compat import minor_version, patch

#: ``all``: every process that loads the plugin. ``front end``: where engines are asked for.
Process = Literal["all", "front end", "engine core", "worker"]


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One patched function.

    Attributes:
        owner: ``module:Class``, or ``module:`` for a function as that module calls it.
        name: of the function.
        parameters: names that its first parameters must have: what the wrapper relies on.
        wrapper: ``module:function`` that takes the original and returns the replacement.
        why: what the wrapper does, and why.
        until: the change upstream that would make the patch unnecessary.
        versions: of vLLM that need it; none is all of them.

    """

    owner: str
    name: str
    parameters: tuple[str, ...]
    wrapper: str
    why: str
    until: str
    versions: tuple[str, ...] = ()

    def apply(self) -> None:
        """Patch the function, if this vLLM needs it and it is not patched yet.

        Raises:
            UserError: if its parameters are not those that are expected.

        """
        if not self.versions or minor_version() in self.versions:
            patch(resolved(self.owner), self.name, self.parameters, resolved(self.wrapper))


def apply(process: Process) -> None:
    """Apply the patches of a process; those applied before stay as they are."""
    for entry in PATCHES[process]:
        entry.apply()


def resolved(path: str) -> Any:
    """Return what ``module:Name`` or ``module:`` names."""
    module, _, name = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


def _patch(function: str, **rest: Any) -> Patch:
    """Return the patch of ``module:Class.name(first, parameters)``, or of one without a class."""
    module, _, path = function.removesuffix(")").partition(":")
    path, _, parameters = path.partition("(")
    owner, _, name = path.rpartition(".")
    names = tuple(parameters.split(", "))
    return Patch(owner=f"{module}:{owner}", name=name, parameters=names, **rest)


_METHOD_REGISTRY = "a registry of speculative methods with keys of their own"
_TREE_DRAFTS = "drafts that come with their parents"
_RESERVED_BLOCKS = "KV-cache blocks that a plugin can reserve"
_START_UP_ERRORS = "start-up errors sent to the front end with their message"

PATCHES: dict[Process, list[Patch]] = {
    "all": [
        _patch(
            "vllm.engine.arg_utils:EngineArgs.add_cli_args(parser)",
            wrapper="vllm_medusa.plugin.arguments:wrap_add_cli_args",
            why="`--speculative-config medusa` and `--spec-method medusa` are accepted",
            until=_METHOD_REGISTRY,
        ),
        _patch(
            "vllm.engine.arg_utils:EngineArgs.create_engine_config(self)",
            wrapper="vllm_medusa.plugin.arguments:wrap_create_engine_config",
            why="our keys are taken out; vLLM gets a `custom_class` proposer and our worker class",
            until=_METHOD_REGISTRY,
        ),
        _patch(
            "vllm.config:VllmConfig._get_v2_model_runner_unsupported_features(self)",
            wrapper="vllm_medusa.plugin.v2_config:wrap_unsupported_features",
            why="Model Runner V2 accepts our method, which has the name `custom_class` there",
            until=_METHOD_REGISTRY,
        ),
        _patch(
            "vllm.config:VllmConfig.__post_init__(self)",
            wrapper="vllm_medusa.plugin.v2_config:wrap_post_init",
            why="on V2: asynchronous scheduling, and numbers of drafts by batch size",
            until=_METHOD_REGISTRY,
        ),
        _patch(
            "vllm.sampling_params:SamplingParams._validate_spec_decode(self, speculative_config)",
            wrapper="vllm_medusa.plugin.sampling_params:wrap_validate_spec_decode",
            why="`min_p` and `logit_bias` are allowed; what trees do not support is refused",
            until="refusals that depend on the sampler, not on speculation",
        ),
    ],
    "front end": [
        _patch(
            "vllm.v1.engine.utils:wait_for_engine_startup(handshake_socket, core_engines)",
            wrapper="vllm_medusa.plugin.one_line_errors:wrap_wait_for_engine_startup",
            why="an error that only the engine's process can find is printed last, in one line",
            until=_START_UP_ERRORS,
        ),
        _patch(
            "vllm.v1.metrics.loggers:StatLoggerManager.__init__(self, vllm_config)",
            wrapper="vllm_medusa.plugin.metrics:wrap_stat_loggers",
            why="our counters are among vLLM's metrics. The entry points "
            "`vllm.stat_logger_plugins` serve `vllm serve` only, and turn on statistics that the "
            "user turned off",
            until="this entry point for all engines, without the side effect",
        ),
        _patch(
            "vllm.v1.metrics.loggers:PrometheusStatLogger.__init__(self, vllm_config)",
            wrapper="vllm_medusa.plugin.metrics:wrap_prometheus",
            why="`/metrics` has a position for each depth of a tree, not for each node",
            until="a number of positions that is independent of the number of draft tokens",
        ),
    ],
    "engine core": [
        _patch(
            "vllm.v1.executor.abstract:Executor.__init__(self, vllm_config)",
            wrapper="vllm_medusa.plugin.one_line_errors:wrap_executor",
            why="a user's mistake that a worker finds, also on Ray, ends the process with one line",
            until=_START_UP_ERRORS,
        ),
        _patch(
            "vllm.v1.engine.core:EngineCore._initialize_kv_caches(self, vllm_config)",
            wrapper="vllm_medusa.plugin.core.memory:wrap_initialize_kv_caches",
            why="gives the configuration to the next two; if forks do not fit, the process ends "
            "with one line",
            until="the configuration as an argument of the next two",
        ),
        _patch(
            "vllm.v1.engine.core:get_kv_cache_configs(vllm_config, kv_cache_specs, "
            "available_memory)",
            wrapper="vllm_medusa.plugin.core.memory:wrap_get_kv_cache_configs",
            why="`max_model_len=auto` is fitted into the KV cache without the fork blocks",
            until=_RESERVED_BLOCKS,
        ),
        _patch(
            "vllm.v1.engine.core:generate_scheduler_kv_cache_config(kv_cache_configs)",
            wrapper="vllm_medusa.plugin.core.memory:wrap_generate_scheduler_kv_cache_config",
            why="the scheduler gets the KV cache without the fork blocks",
            until=_RESERVED_BLOCKS,
        ),
        _patch(
            "vllm.v1.structured_output:StructuredOutputManager.grammar_bitmask(self, requests, "
            "structured_output_request_ids, scheduled_spec_decode_tokens)",
            wrapper="vllm_medusa.plugin.core.structured_output:wrap_grammar_bitmask",
            why="each node's mask follows the node's own path, not all nodes before it",
            until=_TREE_DRAFTS,
        ),
        _patch(
            "vllm.v1.structured_output:StructuredOutputManager.validate_tokens(self, request, "
            "spec_tokens)",
            wrapper="vllm_medusa.plugin.core.structured_output:wrap_validate_tokens",
            why="drafts are not cut at the first node that would not be allowed in a chain",
            until=_TREE_DRAFTS,
        ),
        _patch(
            "vllm.v1.structured_output:StructuredOutputManager._create_grammar(self, request)",
            wrapper="vllm_medusa.plugin.core.structured_output:wrap_create_grammar",
            why="an accepted path can continue after a grammar's end",
            until="`GuidanceGrammar.accept_tokens` that ignores tokens after the end",
        ),
        _patch(
            "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids(self, draft_token_ids)",
            wrapper="vllm_medusa.plugin.core.draft_parents:wrap_update_draft_token_ids",
            why="a request with a grammar keeps the parents of its drafts",
            until=_TREE_DRAFTS,
        ),
        _patch(
            "vllm.v1.core.sched.scheduler:Scheduler.update_draft_token_ids_in_output(self, "
            "draft_token_ids, scheduler_output)",
            wrapper="vllm_medusa.plugin.core.draft_parents:wrap_update_draft_token_ids",
            why="the same, with asynchronous scheduling",
            until=_TREE_DRAFTS,
        ),
        _patch(
            "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_after_schedule(self, "
            "scheduler_output)",
            wrapper="vllm_medusa.plugin.core.max_nodes:wrap_update_after_schedule",
            why="a request runs at most its own `max_nodes` drafts",
            until="a number of drafts for each request",
        ),
        _patch(
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output(self, scheduler_output, "
            "model_runner_output)",
            wrapper="vllm_medusa.plugin.metrics:wrap_update_from_output",
            why="our counters are sent with the step's statistics, which get a position for each "
            "depth",
            until="statistics that a plugin can extend",
        ),
        _patch(
            "vllm.v1.core.sched.scheduler:Scheduler._update_request_with_output(self, request, "
            "new_token_ids)",
            wrapper="vllm_medusa.plugin.core.sessions:wrap_update_request_with_output",
            why="a streaming-input session continues after the token that stopped it, not after "
            "all that were accepted",
            until="vLLM 0.33, which does this",
            versions=("0.32",),
        ),
    ],
    "worker": [
        _patch(
            "vllm.model_executor.model_loader.base_loader:BaseModelLoader.create_model(self, "
            "vllm_config, model_config, prefix)",
            wrapper="vllm_medusa.plugin.worker.merged_checkpoint:wrap_create_model",
            why="the target's loader does not see the tensors of heads in the target's directory",
            until="models that skip the tensors of a proposer",
        ),
        _patch(
            "vllm.v1.worker.gpu_model_runner:build_logitsprocs(vllm_config)",
            wrapper="vllm_medusa.plugin.worker.v1.logits_processors:wrap_build_logitsprocs",
            why="the V1 runner loads the logits processors that it leaves out when tokens are "
            "speculated; they are applied node by node",
            until="logits processors that say whether they can follow drafts",
        ),
    ],
}
