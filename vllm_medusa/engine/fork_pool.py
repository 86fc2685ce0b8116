"""The pool of fork blocks: how large it is, and which request holds which part of it.

The pool is the last blocks of the KV cache. The scheduler is told that they do not exist
(`plan_fork_pool` runs in the engine core and in every worker, with the same result), so vLLM's
own accounting of memory includes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_medusa.config import ConfigError
from vllm_medusa.tree.forks import ForkGeometry
from vllm_medusa.tree.layout import TreeLayout

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
    layout: TreeLayout,
    num_blocks: int,
    block_sizes: Sequence[int],
    max_model_len: int,
    max_num_seqs: int,
    max_tree_requests: int | None,
) -> ForkPool:
    """Divide the KV cache between the scheduler and the forks.

    Args:
        layout: the draft tree.
        num_blocks: blocks of the KV cache.
        block_sizes: tokens of a block, for each KV-cache group.
        max_model_len: longest sequence; the scheduler keeps room for one of this length.
        max_num_seqs: most requests in a batch.
        max_tree_requests: requests that the user wants to hold forks at once.

    Raises:
        ConfigError: if not even one request's forks fit.

    """
    geometries = tuple(ForkGeometry.of(layout, size) for size in block_sizes)
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
        raise ConfigError(
            f"the KV cache of {num_blocks} blocks has no room for the {per_request} fork blocks of "
            f"one request beside a sequence of max_model_len={max_model_len}; give vLLM more KV "
            "cache memory, lower max_model_len, or use a tree of fewer leaves (tree='chain' "
            "needs none)"
        )
    pool_blocks = num_requests * per_request
    return ForkPool(num_requests, num_blocks - pool_blocks, pool_blocks, geometries)


class ForkSlots:
    """Which request holds which slot of the pool, and how far its forks mirror its tail."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))[::-1]
        self._slot: dict[str, int] = {}
        self._mirrored: dict[str, tuple[int, int]] = {}

    @property
    def num_held(self) -> int:
        """Number of slots in use."""
        return len(self._slot)

    def get(self, req_id: str) -> int:
        """Return the slot a request holds."""
        return self._slot[req_id]

    def acquire(self, req_id: str) -> bool:
        """Give the request a slot if it has none; return whether it has one now."""
        if req_id in self._slot:
            return True
        if not self._free:
            return False
        self._slot[req_id] = self._free.pop()
        return True

    def release(self, req_ids: Iterable[str]) -> None:
        """Take back the slots of these requests, if they have any."""
        for req_id in req_ids:
            slot = self._slot.pop(req_id, None)
            self._mirrored.pop(req_id, None)
            if slot is not None:
                self._free.append(slot)

    def is_mirrored(self, req_id: str, num_tokens: int, num_paths: int) -> bool:
        """Whether the request's first ``num_paths`` paths hold its tail up to ``num_tokens``."""
        tokens, paths = self._mirrored.get(req_id, (-1, 0))
        return tokens == num_tokens and paths >= num_paths

    def set_mirrored(self, req_id: str, num_tokens: int, num_paths: int) -> None:
        """Note that the request's first ``num_paths`` paths hold its tail up to ``num_tokens``."""
        self._mirrored[req_id] = (num_tokens, num_paths)
