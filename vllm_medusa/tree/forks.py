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
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_medusa.tree.step_trees import IntArray, StepTrees

#: Slot that a K/V write skips, as vLLM's ``PAD_SLOT_ID``.
PAD_SLOT = -1


@dataclass(frozen=True)
class ForkGeometry:
    """How a request's fork blocks are laid out, for one KV block size.

    The blocks of a fork form a ring: block ``k`` of the sequence lies at ring place ``k % ring``.
    So when the tail moves on to the next block, that block is already in its place.

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
        """Return the geometry for trees of so many fork paths and of such a depth."""
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


@dataclass(frozen=True)
class ForkIndices:
    """The indices of one step that do not depend on where in the cache its requests are.

    B requests run T tokens as Q pseudo-sequences, F of them in fork blocks, and write K/V to E
    slots. A commit writes to C further slots at most.

    Attributes:
        token_req: [T] request of each token.
        token_offset: [T] position of each token, from the request's number of computed tokens.
        seq_req: [Q] request of each pseudo-sequence.
        seq_length: [Q] its length, from the request's number of computed tokens.
        query_start_loc: [Q + 1] int32, first token of each pseudo-sequence.
        fork_seqs: [F] the pseudo-sequences of paths other than the first.
        fork_req: [F] their requests.
        fork_path: [F] their fork paths.
        write_token: [E] token whose K/V is written.
        slot_req: [E + C] request whose blocks a write goes to; the commit's writes follow the
            step's own.
        slot_path: [E + C] the fork path whose blocks it goes to; 0: the request's own.
        slot_offset: [E + C] the write's position, from the request's number of computed tokens.
        node_write: [B, N + 1] a place among the E that holds each node; 0 for nodes not run.

    """

    token_req: Tensor
    token_offset: Tensor
    seq_req: Tensor
    seq_length: Tensor
    query_start_loc: Tensor
    fork_seqs: Tensor
    fork_req: Tensor
    fork_path: Tensor
    write_token: Tensor
    slot_req: Tensor
    slot_path: Tensor
    slot_offset: Tensor
    node_write: Tensor

    def to(self, device: torch.device) -> ForkIndices:
        """Return the indices on a device."""
        return ForkIndices(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class ForkStep:
    """One step that runs trees in forks.

    Attributes:
        host: the indices, on the host.
        device: the same on the device of the KV cache.
        num_tokens: [B] tokens that each request runs.
        num_paths: [B] fork paths that each request runs: 1 for one that runs no tree.
        num_mirrored: [B] paths that hold the request's tail before the step; 1: its own blocks.
        num_live: [B] paths that hold the request's tail after the commit; 1: its own blocks only.
        max_query_len: queries of the longest pseudo-sequence.

    """

    host: ForkIndices
    device: ForkIndices
    num_tokens: IntArray
    num_paths: IntArray
    num_mirrored: IntArray
    num_live: IntArray
    max_query_len: int

    @property
    def num_seqs(self) -> int:
        """Number of pseudo-sequences, Q."""
        return self.host.seq_req.numel()

    @cached_property
    def num_writes(self) -> int:
        """Number of slots that the step itself writes, E."""
        return self.host.write_token.numel()


def make_fork_step(
    trees: StepTrees,
    runs_tree: NDArray[np.bool_],
    num_tokens: IntArray,
    num_mirrored: IntArray,
    device: torch.device | str = "cpu",
) -> ForkStep | None:
    """Compute a step's indices.

    Args:
        trees: the step's trees.
        runs_tree: [B] whether a request's tokens are the root and the nodes of its tree; if not,
            they are tokens in a row.
        num_tokens: [B] tokens that each request runs.
        num_mirrored: [B] fork paths of each request that hold its tail; 1: its own blocks only.
        device: of the KV cache.

    Returns:
        The step; None if no request runs more than one fork path or has mirrors to keep.

    """
    requests = np.arange(len(num_tokens))
    token_start = _starts(num_tokens)
    token_req = np.repeat(requests, num_tokens)
    place = np.arange(len(token_req)) - token_start[token_req]
    in_tree = runs_tree[token_req]
    node = np.where(in_tree, place, 0)
    depth = np.where(in_tree, trees.depths[token_req, node], place)
    parent = np.where(in_tree, trees.parents[token_req, node], place - 1)
    seq_start = np.flatnonzero((place == 0) | (parent != place - 1))
    seq_end = np.append(seq_start[1:], len(token_req)) - 1
    seq_req = token_req[seq_start]
    num_paths = np.bincount(seq_req, minlength=len(requests))
    # A request that runs a prompt has no mirrors; one that decodes keeps those it has.
    num_live = np.where(runs_tree | (num_tokens == 1), np.maximum(num_paths, num_mirrored), 1)
    if not ((num_live > 1) & runs_tree).any():
        return None
    seq_path = np.arange(len(seq_req)) - _starts(num_paths)[seq_req]
    seq_length = depth[seq_end] + 1
    writes = _writes(trees, runs_tree, seq_req, place[seq_end], seq_length)
    commits = _commits(seq_req, seq_length, num_paths, num_live)
    node_write = np.zeros_like(trees.parents)
    holds = runs_tree[writes.req] | (writes.offset == 0)
    node_write[writes.req[holds], writes.node[holds]] = np.flatnonzero(holds)
    forks = np.flatnonzero(seq_path)

    def tensor(values: IntArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))

    host = ForkIndices(
        token_req=tensor(token_req),
        token_offset=tensor(depth),
        seq_req=tensor(seq_req),
        seq_length=tensor(seq_length),
        query_start_loc=tensor(np.append(seq_start, len(token_req))).to(torch.int32),
        fork_seqs=tensor(forks),
        fork_req=tensor(seq_req[forks]),
        fork_path=tensor(seq_path[forks]),
        write_token=tensor(token_start[writes.req] + writes.node),
        slot_req=tensor(np.concatenate((writes.req, commits.req))),
        slot_path=tensor(np.concatenate((seq_path[writes.seq], commits.path))),
        slot_offset=tensor(np.concatenate((writes.offset, commits.offset))),
        node_write=tensor(node_write),
    )
    return ForkStep(
        host=host,
        device=host.to(torch.device(device)),
        num_tokens=num_tokens,
        num_paths=num_paths,
        num_mirrored=num_mirrored,
        num_live=num_live,
        max_query_len=int((seq_end - seq_start).max()) + 1,
    )


@dataclass(frozen=True)
class _Writes:
    """[E] a step's writes: pseudo-sequence, request, node (or token's place) and offset."""

    seq: IntArray
    req: IntArray
    node: IntArray
    offset: IntArray


def _writes(
    trees: StepTrees,
    runs_tree: NDArray[np.bool_],
    seq_req: IntArray,
    last_node: IntArray,
    seq_length: IntArray,
) -> _Writes:
    """Write each pseudo-sequence's whole way from the root, not only what it adds."""
    seq = np.repeat(np.arange(len(seq_req)), seq_length)
    req = seq_req[seq]
    offset = np.arange(len(seq)) - _starts(seq_length)[seq]
    in_tree = runs_tree[req]
    last = np.where(in_tree, last_node[seq], 0)
    on_way = trees.ancestors[req, last, np.minimum(offset, trees.depth)]
    return _Writes(seq, req, np.where(in_tree, on_way, offset), offset)


@dataclass(frozen=True)
class _Commits:
    """[C] where a commit may write: request, fork path and offset."""

    req: IntArray
    path: IntArray
    offset: IntArray


def _commits(
    seq_req: IntArray, seq_length: IntArray, num_paths: IntArray, num_live: IntArray
) -> _Commits:
    """Write what is accepted to all live paths; the step has the root in those that it ran."""
    deepest = np.zeros_like(num_live)
    np.maximum.at(deepest, seq_req, seq_length - 1)
    kept = np.flatnonzero(num_live > 1)
    req = np.repeat(kept, num_live[kept])
    path = np.arange(len(req)) - np.repeat(_starts(num_live[kept]), num_live[kept])
    has_root = path < num_paths[req]
    counts = deepest[req] + ~has_root
    pair = np.repeat(np.arange(len(req)), counts)
    offset = np.arange(len(pair)) - _starts(counts)[pair] + has_root[pair]
    return _Commits(req[pair], path[pair], offset)


def _starts(counts: IntArray) -> IntArray:
    """Exclusive cumulative sums."""
    starts: IntArray = np.cumsum(counts) - counts
    return starts


def expand_block_table(
    indices: ForkIndices,
    geometry: ForkGeometry,
    block_table: Tensor,
    num_computed_tokens: Tensor,
    fork_base: Tensor,
) -> Tensor:
    """Return the block table of every pseudo-sequence.

    Args:
        indices: the step's, on the device of the tables.
        geometry: layout of the forks in this KV-cache group.
        block_table: [B, W] the requests' block tables, at least as wide as any sequence is long.
        num_computed_tokens: [B] int64, tokens in the KV cache; the root is the next one.
        fork_base: [B] int64, first fork block of each request; unused where not forked.

    Returns:
        [Q, W + ring]; entries behind a pseudo-sequence's last block are arbitrary.

    """
    rows = block_table.index_select(0, indices.seq_req)
    rows = torch.nn.functional.pad(rows, (0, geometry.ring))
    tail = (num_computed_tokens // geometry.block_size).index_select(0, indices.fork_req)
    block_idx = tail[:, None] + torch.arange(geometry.ring, device=block_table.device)
    base = fork_base.index_select(0, indices.fork_req)
    blocks = geometry.block(base[:, None], indices.fork_path[:, None], block_idx)
    rows[indices.fork_seqs[:, None], block_idx] = blocks.to(rows.dtype)
    return rows


def write_slots(
    indices: ForkIndices,
    geometry: ForkGeometry,
    block_table: Tensor,
    num_computed_tokens: Tensor,
    fork_base: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the [E] slots of a step's K/V writes and the [C] slots of its commit's, int64.

    The arguments are those of `expand_block_table`.
    """
    positions = num_computed_tokens.index_select(0, indices.slot_req) + indices.slot_offset
    block_idx = positions // geometry.block_size
    own = block_table[indices.slot_req, block_idx].to(torch.int64)
    base = fork_base.index_select(0, indices.slot_req)
    forked = geometry.block(base, indices.slot_path, block_idx)
    blocks = torch.where(indices.slot_path > 0, forked, own)
    slots = blocks * geometry.block_size + positions % geometry.block_size
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
        length: [B] how many of them behind the root were accepted.

    Returns:
        ``(source, slots)``, each [C] int64: the place among the step's E writes that holds the
        K/V, and the slot it goes to or `PAD_SLOT`.

    """
    num_writes = indices.write_token.numel()
    req, offset = indices.slot_req[num_writes:], indices.slot_offset[num_writes:]
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
        first_path: [M] first fork path, at least 1, of each request that is to find its tail.
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
