"""The pool of fork blocks: how large it is, and which request holds which part of it.

The pool is the last blocks of the KV cache. The scheduler is told that they do not exist
(`plan_fork_pool` runs in the engine core and in every worker, with the same result), so vLLM's
own accounting of memory includes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_medusa.config import MedusaConfig
from vllm_medusa.errors import UserError
from vllm_medusa.tree.forks import ForkGeometry

#: Share of the KV cache that forks take if the user does not say how many requests may have them.
_DEFAULT_SHARE = 1 / 8
#: And never more requests than this: with so many in a batch, trees no longer pay.
_DEFAULT_MAX_REQUESTS = 64


@dataclass(frozen=True)
class ForkPool:
    """Where the fork blocks lie.

    Attributes:
        num_requests: how many requests can hold forks at once.
        first_block: first block of the pool; those before it are the scheduler's.
        num_blocks: blocks of the pool.
        geometries: layout of a request's forks, for each KV-cache group.

    """

    num_requests: int
    first_block: int
    num_blocks: int
    geometries: tuple[ForkGeometry, ...]

    def group_base(self, group: int) -> int:
        """Return the first block of a group's part; block ids are never shared by groups."""
        before = sum(geometry.blocks_per_request for geometry in self.geometries[:group])
        return self.first_block + self.num_requests * before


def plan_fork_pool(
    max_paths: int,
    max_depth: int,
    num_blocks: int,
    block_sizes: Sequence[int],
    max_model_len: int,
    max_num_seqs: int,
    max_tree_requests: int | None,
) -> ForkPool:
    """Divide the KV cache between the scheduler and the forks.

    Args:
        max_paths: fork paths of the widest tree.
        max_depth: depth of the deepest tree.
        num_blocks: blocks of the KV cache.
        block_sizes: tokens of a block, for each KV-cache group.
        max_model_len: longest sequence; the scheduler keeps room for one of this length.
        max_num_seqs: most requests in a batch.
        max_tree_requests: requests that the user wants to hold forks at once.

    Raises:
        UserError: if not even one request's forks fit.

    """
    geometries = tuple(ForkGeometry.of(max_paths, max_depth, size) for size in block_sizes)
    per_request = sum(geometry.blocks_per_request for geometry in geometries)
    if per_request == 0:
        return ForkPool(0, num_blocks, 0, geometries)
    # One sequence of full length, a block for the tree behind it, and the null block.
    reserved = 1 + sum(-(-max_model_len // size) + 1 for size in block_sizes)
    fitting = (num_blocks - reserved) // per_request
    if max_tree_requests is not None:
        wanted = max_tree_requests
    else:
        wanted = min(int(num_blocks * _DEFAULT_SHARE) // per_request, _DEFAULT_MAX_REQUESTS)
        wanted = max(wanted, 1)
    num_requests = min(wanted, fitting, max_num_seqs)
    if num_requests < 1:
        raise UserError(
            f"the KV cache of {num_blocks} blocks has no room for the {per_request} fork blocks of "
            f"one request beside a sequence of max_model_len={max_model_len}; give vLLM more KV "
            "cache memory, lower max_model_len, or use a tree of fewer leaves (tree='chain' "
            "needs none)"
        )
    pool_blocks = num_requests * per_request
    return ForkPool(num_requests, num_blocks - pool_blocks, pool_blocks, geometries)


def fork_pool_of(vllm_config: Any, kv_cache_config: Any, config: MedusaConfig) -> ForkPool:
    """Return the fork pool of a KV cache; the same in the engine core and in every worker.

    Args:
        vllm_config: vLLM's configuration.
        kv_cache_config: the whole KV cache, fork blocks included.
        config: our configuration.

    """
    return plan_fork_pool(
        config.limits.max_paths,
        config.limits.max_depth,
        kv_cache_config.num_blocks,
        [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups],
        vllm_config.model_config.max_model_len,
        vllm_config.scheduler_config.max_num_seqs,
        config.max_tree_requests,
    )
