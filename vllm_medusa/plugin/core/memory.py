"""The engine core's KV cache without the fork blocks."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from vllm_medusa.config import MedusaConfig
from vllm_medusa.plugin.compat import plugin_logger, replaced
from vllm_medusa.plugin.fork_pool import (
    DEFAULT_SHARE,
    CacheShape,
    ForkPool,
    divide,
    plan_fork_pool,
)
from vllm_medusa.plugin.identity import medusa_config_of
from vllm_medusa.plugin.one_line_errors import exit_in_one_line

logger = plugin_logger(__name__)

#: Share of the KV cache from which on forks that the user asked for cause a warning.
_LARGE_SHARE = 1 / 2

_vllm_config: ContextVar[Any] = ContextVar("vllm_config", default=None)


def wrap_initialize_kv_caches(original: Any) -> Any:
    """Give the configuration to the functions that this method calls."""

    def _initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        token = _vllm_config.set(vllm_config)
        try:
            with exit_in_one_line():
                return original(self, vllm_config)
        finally:
            _vllm_config.reset(token)

    return _initialize_kv_caches


def wrap_get_kv_cache_configs(original: Any) -> Any:
    """Fit ``max_model_len=auto`` into the KV cache without the fork blocks.

    vLLM fits it into the whole cache, which then has no room for forks. So vLLM fits it once more,
    into a cache with fewer blocks.
    """

    def get_kv_cache_configs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        model_config = vllm_config.model_config
        max_model_len = model_config.max_model_len
        kv_cache_configs = original(vllm_config, *args, **kwargs)
        config = medusa_config_of(vllm_config)
        if (
            config is None
            or config.limits.max_paths == 1
            or vllm_config.use_v2_model_runner
            or model_config.original_max_model_len != -1
        ):
            return kv_cache_configs
        cache = CacheShape.of(vllm_config, kv_cache_configs[0], is_fitted=False)
        max_num_seqs = vllm_config.scheduler_config.max_num_seqs
        pool = plan_fork_pool(config.limits, cache, max_num_seqs, config.max_tree_requests)
        num_blocks = pool.first_block - len(cache.block_sizes)
        logger.info(
            "Medusa: max_model_len is fitted into %d of %d KV blocks; the others are for forks",
            num_blocks,
            cache.num_blocks,
        )
        model_config.max_model_len = max_model_len
        with replaced(vllm_config.cache_config, "num_gpu_blocks_override", num_blocks):
            original(vllm_config, *args, **kwargs)
        return kv_cache_configs

    return get_kv_cache_configs


def wrap_generate_scheduler_kv_cache_config(original: Any) -> Any:
    """Divide the KV cache: workers know all of it, the scheduler only its own part."""

    def generate_scheduler_kv_cache_config(kv_cache_configs: Any) -> Any:
        kv_cache_config = original(kv_cache_configs)
        vllm_config = _vllm_config.get()
        config = medusa_config_of(vllm_config)
        if config is not None and vllm_config.use_v2_model_runner:
            logger.info("Medusa: %s, on Model Runner V2", _described(config))
        elif config is not None:
            pool = divide(vllm_config, kv_cache_configs, config)
            _log_start(config, pool, kv_cache_config)
            _warn_of_size(config, pool, vllm_config, CacheShape.of(vllm_config, kv_cache_config))
            kv_cache_config.num_blocks -= pool.num_blocks
        return kv_cache_config

    return generate_scheduler_kv_cache_config


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
        f"{limits.max_paths} leaves, depth {limits.max_depth}), "
        f"acceptance {'lossless' if config.typical is None else 'typical'}"
    )


def _warn_of_size(
    config: MedusaConfig, pool: ForkPool, vllm_config: Any, cache: CacheShape
) -> None:
    """Warn if forks leave few blocks to the scheduler, or if fewer requests get them than asked."""
    wanted = config.max_tree_requests
    if not pool.num_blocks:
        return
    if wanted is not None and pool.num_requests < min(
        wanted, vllm_config.scheduler_config.max_num_seqs
    ):
        logger.warning(
            "Medusa: max_tree_requests=%d, but the KV cache of %d blocks has room for the forks of "
            "%d requests (%d blocks each) beside one sequence of max_model_len=%d. Lower "
            "max_tree_requests or give vLLM more KV cache memory.",
            wanted,
            cache.num_blocks,
            pool.num_requests,
            pool.blocks_per_request,
            cache.max_model_len,
        )
    if pool.num_blocks <= cache.num_blocks * (DEFAULT_SHARE if wanted is None else _LARGE_SHARE):
        return
    logger.warning(
        "Medusa: the forks of %d requests take %d of %d KV blocks (%.0f %%). The scheduler has %d "
        "left, enough for %.1f sequences of max_model_len=%d at once. %s",
        pool.num_requests,
        pool.num_blocks,
        cache.num_blocks,
        100 * pool.num_blocks / cache.num_blocks,
        pool.first_block,
        (pool.first_block - 1) / sum(cache.sequence_blocks),
        cache.max_model_len,
        "One request's forks take more than the eighth of the cache that forks have by default: "
        "give vLLM more KV cache memory, a smaller block_size or a tree of fewer leaves."
        if wanted is None
        else "Lower max_tree_requests to leave more blocks.",
    )
