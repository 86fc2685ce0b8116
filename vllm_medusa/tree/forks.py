"""Path forks: the index arithmetic that lets a plain causal kernel verify trees.

Each fork path (`step_trees.path_starts`) becomes a *pseudo-sequence* of its request: its block
table is the request's, except that the blocks from the tail on are private *fork blocks*. The nodes
a path adds to those before are contiguous, so they are the pseudo-sequence's queries and the plain
causal mask is the ancestor mask. The first path uses the request's own blocks.

Fork blocks stay with a request from step to step and *mirror* its tail: after each step the
accepted tokens' K/V is written to the request's own blocks and to all its mirrors, so that the next
step finds every fork's tail in place. Whole blocks are copied only to paths that have no mirror
yet, or after steps without drafts.

All functions here map indices to indices: they know neither vLLM nor what a block holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_medusa.tree.fork_step import ForkIndices

#: Slot that a K/V write skips, as vLLM's ``PAD_SLOT_ID``.
PAD_SLOT = -1


@dataclass(frozen=True)
class ForkGeometry:
    """How a request's fork blocks are laid out, for one KV block size.

    The blocks of a fork form a ring: block ``k`` of the sequence is at ring place ``k % ring``.
    So when the tail goes on to the next block, that block is already in its place.

    Attributes:
        block_size: tokens of a block.
        ring: blocks of one fork: the most that a tree's tokens can straddle.
        num_forks: forks of one request: fork paths other than the first.

    """

    block_size: int
    ring: int
    num_forks: int

    @classmethod
    def of(cls, max_paths: int, max_depth: int, block_size: int) -> ForkGeometry:
        """Return the geometry for trees with at most these fork paths and this depth."""
        ring = (block_size - 1 + max_depth) // block_size + 1
        return cls(block_size=block_size, ring=ring, num_forks=max_paths - 1)

    @property
    def blocks_per_request(self) -> int:
        """Fork blocks that one request holds."""
        return self.num_forks * self.ring

    def block(self, base: Tensor, path: Tensor, block_idx: Tensor) -> Tensor:
        """Return the fork block that path ``path >= 1`` uses as the sequence's ``block_idx``-th.

        Args:
            base: first of the request's fork blocks.
            path: fork path.
            block_idx: index into the sequence's block table. All three broadcast.

        """
        return base + (path - 1) * self.ring + block_idx % self.ring


def expand_block_table(
    indices: ForkIndices,
    geometry: ForkGeometry,
    block_table: Tensor,
    num_computed_tokens: Tensor,
    fork_base: Tensor,
) -> Tensor:
    """Return the block table of every pseudo-sequence, then of every fork that only keeps a tail.

    Args:
        indices: the step's, on the device of the tables.
        geometry: layout of the forks in this KV-cache group.
        block_table: [B, W] the requests' block tables, at least as wide as any sequence is long.
        num_computed_tokens: [B] int64, tokens in the KV cache; the root is the next one.
        fork_base: [B] int64, first fork block of each request; unused where not forked.

    Returns:
        [S, W + ring]; entries after a row's last block are arbitrary.

    """
    rows = block_table.index_select(0, indices.row_req)
    rows = torch.nn.functional.pad(rows, (0, geometry.ring))
    tail = (num_computed_tokens // geometry.block_size).index_select(0, indices.fork_req)
    block_idx = tail[:, None] + torch.arange(geometry.ring, device=block_table.device)
    base = fork_base.index_select(0, indices.fork_req)
    blocks = geometry.block(base[:, None], indices.fork_path[:, None], block_idx)
    rows[indices.fork_rows[:, None], block_idx] = blocks.to(rows.dtype)
    return rows


def write_slots(
    indices: ForkIndices, block_size: int, rows: Tensor, num_computed_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the [E] slots of a step's K/V writes and the [C] slots of its commit's, int64.

    Args:
        indices: the step's.
        block_size: tokens of a block.
        rows: [S, W + ring] from `expand_block_table`.
        num_computed_tokens: [B] int64, as there.

    """
    starts = num_computed_tokens.index_select(0, indices.row_req)
    positions = starts.index_select(0, indices.slot_row) + indices.slot_offset
    block_idx = positions // block_size
    # A token's place in its block is its position less that of the block's first.
    slots = (rows[indices.slot_row, block_idx] - block_idx) * block_size + positions
    num_writes = indices.write_token.numel()
    return slots[:num_writes], slots[num_writes:]


def commit_writes(
    indices: ForkIndices, commit_slots: Tensor, path: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the writes that put the accepted tokens into own blocks and mirrors.

    Args:
        indices: the step's.
        commit_slots: [C] from `write_slots`.
        path: [B, D + 1] accepted nodes from the root on (`Acceptance.path`).
        length: [B] number of accepted nodes, without the root.

    Returns:
        ``(source, slots)``, each [C] int64: the place among the step's E writes that holds the
        K/V, and the slot it goes to or `PAD_SLOT`.

    """
    req, offset = indices.commit_req, indices.slot_offset[indices.write_token.numel() :]
    source = indices.node_write[req, path[req, offset]]
    accepted = offset <= length.index_select(0, req)
    return source, commit_slots.where(accepted, PAD_SLOT)


def mirror_copies(
    geometry: ForkGeometry,
    first_path: Tensor,
    num_paths: Tensor,
    tail_block: Tensor,
    block_idx: Tensor,
    fork_base: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the whole-block copies that put requests' partial tail blocks into forks.

    Args:
        geometry: layout of the forks in this KV-cache group.
        first_path: [M] first fork path, at least 1, of each request that gets the tail.
        num_paths: [M] all of its paths; those from ``first_path`` on get a copy.
        tail_block: [M] block that holds each request's partial tail.
        block_idx: [M] its index in the request's block table.
        fork_base: [M] first fork block of each request.

    Returns:
        ``(source, destination)`` block ids, both int64 and of the same length.

    """
    counts = num_paths - first_path
    request = torch.repeat_interleave(counts)
    place = torch.arange(len(request), device=counts.device)
    path = place - (counts.cumsum(0) - counts)[request] + first_path[request]
    return tail_block[request], geometry.block(fork_base[request], path, block_idx[request])
