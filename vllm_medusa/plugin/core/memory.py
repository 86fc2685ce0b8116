"""The engine core's view of the KV cache: without the fork blocks."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from vllm_medusa.config import MedusaConfig
from vllm_medusa.plugin.compat import patch, plugin_logger
from vllm_medusa.plugin.fork_pool import ForkPool, fork_pool_of
from vllm_medusa.plugin.identity import medusa_config_of
from vllm_medusa.plugin.one_line_errors import exit_in_one_line

logger = plugin_logger(__name__)

_vllm_config: ContextVar[Any] = ContextVar("vllm_config", default=None)


def patch_engine_core() -> None:
    """Make the scheduler plan with the KV cache less the fork pool.

    Patches ``EngineCore._initialize_kv_caches`` and ``generate_scheduler_kv_cache_config`` as that
    method calls it (``v1/engine/core.py``).
    """
    from vllm.v1.engine import core

    def wrap_initialize(original: Any) -> Any:
        def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
            token = _vllm_config.set(vllm_config)
            try:
                with exit_in_one_line(isinstance(self, core.EngineCoreProc)):
                    return original(self, vllm_config)
            finally:
                _vllm_config.reset(token)

        return _initialize_kv_caches

    def wrap_generate(original: Any) -> Any:
        def generate_scheduler_kv_cache_config(kv_cache_configs: Any) -> Any:
            kv_cache_config = original(kv_cache_configs)
            vllm_config = _vllm_config.get()
            config = medusa_config_of(vllm_config)
            if config is not None and vllm_config.use_v2_model_runner:
                logger.info("Medusa: %s, on Model Runner V2", _described(config))
            elif config is not None:
                pool = fork_pool_of(vllm_config, kv_cache_config, config)
                _log_start(config, pool, kv_cache_config)
                kv_cache_config.num_blocks -= pool.num_blocks
            return kv_cache_config

        return generate_scheduler_kv_cache_config

    patch(core.EngineCore, "_initialize_kv_caches", ["self", "vllm_config"], wrap_initialize)
    patch(core, "generate_scheduler_kv_cache_config", ["kv_cache_configs"], wrap_generate)


def _log_start(config: MedusaConfig, pool: ForkPool, kv_cache_config: Any) -> None:
    cache_bytes = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors)
    fork_mib = cache_bytes * pool.num_blocks / kv_cache_config.num_blocks / 2**20
    logger.info(
        "Medusa: %s, forks for %d requests in %d KV blocks (%.1f MiB)",
        _described(config),
        pool.num_requests,
        pool.num_blocks,
        fork_mib,
    )


def _described(config: MedusaConfig) -> str:
    limits = config.limits
    return (
        f"heads {config.heads}, tree {config.tree_name} ({limits.max_nodes} nodes, "
        f"{limits.max_paths} leaves, depth {limits.max_depth}), acceptance lossless"
    )
