"""The pool of fork blocks: how large it is, and which request holds which part of it.

The pool is the last blocks of the KV cache. The engine core plans it (`divide`). Its scheduler does
not know these blocks; the workers do. vLLM's own accounting of memory includes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_medusa.config import MedusaConfig
from vllm_medusa.errors import UserError
from vllm_medusa.plugin.compat import replaced
from vllm_medusa.tree.forks import ForkGeometry
from vllm_medusa.tree.limits import TreeLimits

#: Share of the KV cache that forks take if the user does not say how many requests may have them.
DEFAULT_SHARE = 1 / 8
#: Most requests with forks by default: with more in a batch, trees no longer pay.
_DEFAULT_MAX_REQUESTS = 64
#: Share of the cache that is left to sequences if ``max_model_len`` is fitted into it.
_FITTED_SHARE = 1 / 2

#: Attribute of ``KVCacheConfig`` that tells the workers how many requests may hold forks.
_SENT = "medusa_tree_requests"


@dataclass(frozen=True)
class CacheShape:
    """The size of a KV cache.

    Attributes:
        num_blocks: number of its blocks, the null block included.
        block_sizes: tokens of a block, for each KV-cache group.
        sequence_blocks: blocks that the longest sequence takes, for each group.
        max_model_len: tokens of the longest sequence; None: it is not fitted into the cache yet,
            and ``sequence_blocks`` are those of the shortest sequence.

    """

    num_blocks: int
    block_sizes: Sequence[int]
    sequence_blocks: Sequence[int]
    max_model_len: int | None

    @classmethod
    def of(cls, vllm_config: Any, kv_cache_config: Any, is_fitted: bool = True) -> CacheShape:
        """Return the shape of a KV cache.

        Args:
            vllm_config: vLLM's configuration.
            kv_cache_config: the whole cache, fork blocks included.
            is_fitted: whether ``max_model_len`` is already fitted into the cache.

        """
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        model_config = vllm_config.model_config
        max_model_len = model_config.max_model_len
        with replaced(model_config, "max_model_len", max_model_len if is_fitted else 1):
            # Counted as in vLLM: a sliding window needs fewer blocks than its sequence has.
            sequence_blocks = [
                -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)
                for spec in specs
            ]
        return cls(
            kv_cache_config.num_blocks,
            [spec.block_size for spec in specs],
            sequence_blocks,
            max_model_len if is_fitted else None,
        )


@dataclass(frozen=True)
class ForkPool:
    """The place of the fork blocks.

    Attributes:
        num_requests: how many requests can hold forks at once.
        first_block: first block of the pool; those before it are the scheduler's.
        geometries: layout of a request's forks, for each KV-cache group.

    """

    num_requests: int
    first_block: int
    geometries: tuple[ForkGeometry, ...]

    @property
    def blocks_per_request(self) -> int:
        """Fork blocks that one request holds."""
        return sum(geometry.blocks_per_request for geometry in self.geometries)

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.num_requests * self.blocks_per_request

    def group_base(self, group: int) -> int:
        """Return the first block of a group's part; block ids are never shared by groups."""
        before = sum(geometry.blocks_per_request for geometry in self.geometries[:group])
        return self.first_block + self.num_requests * before


def plan_fork_pool(
    limits: TreeLimits, cache: CacheShape, max_num_seqs: int, max_tree_requests: int | None
) -> ForkPool:
    """Divide a KV cache between the scheduler and the forks.

    Args:
        limits: limits of the trees.
        cache: shape of the cache; the scheduler keeps room for one sequence.
        max_num_seqs: most requests in a batch.
        max_tree_requests: requests that the user wants to hold forks at once.

    Raises:
        UserError: if not even one request's forks fit.

    """
    geometries = _geometries(limits, cache.block_sizes)
    per_request = sum(geometry.blocks_per_request for geometry in geometries)
    if per_request == 0:
        return ForkPool(0, cache.num_blocks, geometries)
    # The sequence, in each group a block for the tree after it, and the null block.
    reserved = 1 + sum(cache.sequence_blocks) + len(cache.block_sizes)
    num_requests = min((cache.num_blocks - reserved) // per_request, max_num_seqs)
    if num_requests < 1:
        raise UserError(_no_room(cache, per_request))
    if max_tree_requests is None:
        share = int(cache.num_blocks * DEFAULT_SHARE) // per_request
        max_tree_requests = max(min(share, _DEFAULT_MAX_REQUESTS), 1)
    if cache.max_model_len is None:
        share = int(cache.num_blocks * _FITTED_SHARE) // per_request
        max_tree_requests = min(max_tree_requests, max(share, 1))
    num_requests = min(num_requests, max_tree_requests)
    return ForkPool(num_requests, cache.num_blocks - num_requests * per_request, geometries)


def divide(vllm_config: Any, kv_cache_configs: Sequence[Any], config: MedusaConfig) -> ForkPool:
    """Plan the fork pool, and write its size to the workers' configurations of the KV cache.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_configs: of each worker; their shapes are the same.
        config: our configuration.

    Raises:
        UserError: if not even one request's forks fit.

    """
    cache = CacheShape.of(vllm_config, kv_cache_configs[0])
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    pool = plan_fork_pool(config.limits, cache, max_num_seqs, config.max_tree_requests)
    for kv_cache_config in kv_cache_configs:
        setattr(kv_cache_config, _SENT, pool.num_requests)
    return pool


def fork_pool_of(kv_cache_config: Any, config: MedusaConfig) -> ForkPool:
    """Return the fork pool that the engine core has planned, in a worker.

    Args:
        kv_cache_config: the whole KV cache, fork blocks included.
        config: our configuration.

    """
    sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    pool = ForkPool(getattr(kv_cache_config, _SENT), 0, _geometries(config.limits, sizes))
    return replace(pool, first_block=kv_cache_config.num_blocks - pool.num_blocks)


def _geometries(limits: TreeLimits, block_sizes: Sequence[int]) -> tuple[ForkGeometry, ...]:
    return tuple(ForkGeometry.of(limits.max_paths, limits.max_depth, size) for size in block_sizes)


def _no_room(cache: CacheShape, per_request: int) -> str:
    beside, remedy = "any sequence", ""
    if cache.max_model_len is not None:
        beside = f"a sequence of max_model_len={cache.max_model_len}"
        remedy = "lower max_model_len, "
    return (
        f"the KV cache of {cache.num_blocks} blocks has no room for the {per_request} fork blocks "
        f"of one request beside {beside}; give vLLM more KV cache memory, {remedy}or use a tree of "
        "fewer leaves (tree='chain' needs none)"
    )
