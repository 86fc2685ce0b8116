"""Path forks: the index arithmetic that lets a plain causal kernel verify a tree.

Each fork path (`TreeLayout`) becomes a *pseudo-sequence* of its request: its block table is the
request's, except that the blocks from the tail on are private *fork blocks*. The nodes a path adds
to those before are contiguous, so they are the pseudo-sequence's queries and the plain causal mask
is the ancestor mask. The first path uses the request's own blocks.

Fork blocks stay with a request from step to step and *mirror* its tail: after each step the
accepted tokens' K/V is written to the request's own blocks and to all forks that the step used, so
that the next step finds every fork's tail in place. Whole blocks are copied only for a request's
first tree, or after steps with a smaller one or none.

All functions here map indices to indices: they know neither vLLM nor what a block holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vllm_medusa.tree.layout import TreeLayout

#: Slot that a K/V write skips, as vLLM's ``PAD_SLOT_ID``.
PAD_SLOT = -1


@dataclass(frozen=True)
class ForkGeometry:
    """How a request's fork blocks are laid out, for one KV block size.

    The blocks of a fork form a ring: block ``k`` of the sequence lies at ring place ``k % ring``.
    So when the tail moves on to the next block, that block is already in its place.

    Attributes:
        block_size: tokens of a block.
        ring: blocks of one fork: the most that the tree's tokens can straddle.
        num_forks: forks of one request: fork paths other than the first.

    """

    block_size: int
    ring: int
    num_forks: int

    @classmethod
    def of(cls, layout: TreeLayout, block_size: int) -> ForkGeometry:
        """Return the geometry of a tree's forks."""
        ring = (block_size - 1 + layout.depth) // block_size + 1
        return cls(block_size=block_size, ring=ring, num_forks=layout.num_paths - 1)

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
class StepShape:
    """The indices of one step that depend only on how many tokens each request runs.

    B requests run T tokens as Q pseudo-sequences and write K/V to E slots; R of the requests are
    forked (run more than one fork path). A commit writes to C further slots at most.

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
        slot_seq: [E + C] pseudo-sequence whose blocks a write goes to; the commit's writes follow
            the step's own.
        slot_req: [E + C] its request.
        slot_offset: [E + C] the write's position, from the request's number of computed tokens.
        node_write: [B, N + 1] a place among the E that holds each node; 0 for nodes not run.
        forked_reqs: [R] the forked requests.
        num_paths: [R] fork paths that each of them runs.
        max_query_len: queries of the longest pseudo-sequence.

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
    slot_seq: Tensor
    slot_req: Tensor
    slot_offset: Tensor
    node_write: Tensor
    forked_reqs: Tensor
    num_paths: Tensor
    max_query_len: int

    @property
    def num_seqs(self) -> int:
        """Number of pseudo-sequences."""
        return self.seq_req.numel()

    @property
    def num_writes(self) -> int:
        """Number of slots that the step writes, E."""
        return self.write_token.numel()

    @property
    def is_forked(self) -> bool:
        """Whether any request is forked; if not, the step is vLLM's own but for positions."""
        return self.forked_reqs.numel() > 0


class _Parts:
    """One request's share of a `StepShape`, as plain lists."""

    def __init__(self, layout: TreeLayout, num_tokens: int, num_draft_tokens: int) -> None:
        self.num_tokens = num_tokens
        paths = layout.num_live_paths(num_draft_tokens)
        self.num_paths = paths
        self.is_forked = num_draft_tokens > 0 and paths > 1
        if not self.is_forked:
            # One path at most: the tokens lie one behind the other, as in any other request.
            self.token_offset = list(range(num_tokens))
            self.query_lens, self.seq_length = [num_tokens], [num_tokens]
            self.writes = [(0, token, token) for token in range(num_tokens)]
            self.commits: list[tuple[int, int]] = []
            self.node_write = [0] * layout.num_nodes
            return
        depths, ancestors = layout.depths.tolist(), layout.ancestors.tolist()
        self.token_offset = depths[: num_draft_tokens + 1]
        self.query_lens, self.seq_length, self.writes = [], [], []
        self.node_write = [0] * layout.num_nodes
        for path in range(paths):
            start = layout.path_starts[path]
            last = min(layout.path_ends[path], num_draft_tokens)
            self.query_lens.append(last - start + 1)
            self.seq_length.append(depths[last] + 1)
            for depth in range(depths[last] + 1):
                node = ancestors[last][depth]
                self.node_write[node] = len(self.writes)
                self.writes.append((path, node, depth))
        # A step writes the root to all of its paths by itself.
        offsets = range(1, max(self.seq_length))
        self.commits = [(path, offset) for path in range(paths) for offset in offsets]


class StepShapes:
    """Makes the `StepShape` of a step; the shapes of recent steps are kept.

    Args:
        layout: the full tree.
        device: where the index tensors are needed.

    """

    def __init__(self, layout: TreeLayout, device: torch.device | str = "cpu") -> None:
        self._layout = layout
        self._device = torch.device(device)
        self._parts = lru_cache(maxsize=4096)(self._make_parts)
        self.get = lru_cache(maxsize=256)(self._make_shape)

    def _make_parts(self, num_tokens: int, num_draft_tokens: int) -> _Parts:
        return _Parts(self._layout, num_tokens, num_draft_tokens)

    def _make_shape(
        self, num_tokens: tuple[int, ...], num_draft_tokens: tuple[int, ...]
    ) -> StepShape:
        """Return the shape of a step; called as ``get``.

        Args:
            num_tokens: tokens that each request runs.
            num_draft_tokens: how many of them are drafts; 0, or ``num_tokens - 1``.

        """
        counts = zip(num_tokens, num_draft_tokens, strict=True)
        requests = [self._parts(*count) for count in counts]
        token_start = _exclusive_sums([parts.num_tokens for parts in requests])
        seq_start = _exclusive_sums([len(parts.query_lens) for parts in requests])
        write_start = _exclusive_sums([len(parts.writes) for parts in requests])
        query_lens = [length for parts in requests for length in parts.query_lens]
        writes = [
            (req, path, token_start[req] + token, offset)
            for req, parts in enumerate(requests)
            for path, token, offset in parts.writes
        ]
        commits = [(req, *commit) for req, parts in enumerate(requests) for commit in parts.commits]
        slots = [(req, path, offset) for req, path, _, offset in writes] + commits
        seqs = [
            (req, path)
            for req, parts in enumerate(requests)
            for path in range(len(parts.query_lens))
        ]
        forks = [(seq, req, path) for seq, (req, path) in enumerate(seqs) if path > 0]
        forked = [req for req, parts in enumerate(requests) if parts.is_forked]
        return StepShape(
            token_req=self._indices(
                [req for req, parts in enumerate(requests) for _ in range(parts.num_tokens)]
            ),
            token_offset=self._indices([o for parts in requests for o in parts.token_offset]),
            seq_req=self._indices([req for req, _ in seqs]),
            seq_length=self._indices([n for parts in requests for n in parts.seq_length]),
            query_start_loc=self._indices(
                [*_exclusive_sums(query_lens), sum(query_lens)], torch.int32
            ),
            fork_seqs=self._indices([seq for seq, _, _ in forks]),
            fork_req=self._indices([req for _, req, _ in forks]),
            fork_path=self._indices([path for _, _, path in forks]),
            write_token=self._indices([token for _, _, token, _ in writes]),
            slot_seq=self._indices([seq_start[req] + path for req, path, _ in slots]),
            slot_req=self._indices([req for req, _, _ in slots]),
            slot_offset=self._indices([offset for _, _, offset in slots]),
            node_write=self._indices(
                [
                    [write_start[req] + write for write in parts.node_write]
                    for req, parts in enumerate(requests)
                ]
            ),
            forked_reqs=self._indices(forked),
            num_paths=self._indices([requests[req].num_paths for req in forked]),
            max_query_len=max(query_lens),
        )

    def _indices(self, values: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)


def _exclusive_sums(counts: Sequence[int]) -> list[int]:
    sums, total = [], 0
    for count in counts:
        sums.append(total)
        total += count
    return sums


def expand_block_table(
    shape: StepShape,
    geometry: ForkGeometry,
    block_table: Tensor,
    num_computed_tokens: Tensor,
    fork_base: Tensor,
) -> Tensor:
    """Return the block table of every pseudo-sequence.

    Args:
        shape: the step's shape.
        geometry: layout of the forks in this KV-cache group.
        block_table: [B, W] the requests' block tables, at least as wide as any sequence is long.
        num_computed_tokens: [B] int64, tokens in the KV cache; the root is the next one.
        fork_base: [B] int64, first fork block of each request; unused where not forked.

    Returns:
        [Q, W + ring]; entries behind a pseudo-sequence's last block are arbitrary.

    """
    rows = block_table.index_select(0, shape.seq_req)
    rows = torch.nn.functional.pad(rows, (0, geometry.ring))
    tail = (num_computed_tokens // geometry.block_size).index_select(0, shape.fork_req)
    block_idx = tail[:, None] + torch.arange(geometry.ring, device=block_table.device)
    base = fork_base.index_select(0, shape.fork_req)
    blocks = geometry.block(base[:, None], shape.fork_path[:, None], block_idx)
    rows[shape.fork_seqs[:, None], block_idx] = blocks.to(rows.dtype)
    return rows


def write_slots(
    shape: StepShape, geometry: ForkGeometry, rows: Tensor, num_computed_tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the [E] slots of a step's K/V writes and the [C] slots of its commit's, int64.

    Args:
        shape: the step's shape.
        geometry: layout of the forks in this KV-cache group.
        rows: [Q, >= W] block tables from `expand_block_table`.
        num_computed_tokens: [B] int64.

    """
    positions = num_computed_tokens.index_select(0, shape.slot_req) + shape.slot_offset
    blocks = rows[shape.slot_seq, positions // geometry.block_size].to(torch.int64)
    slots = blocks * geometry.block_size + positions % geometry.block_size
    return slots[: shape.num_writes], slots[shape.num_writes :]


def commit_writes(
    shape: StepShape, commit_slots: Tensor, path: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the writes that put the accepted tokens into own blocks and mirrors.

    Args:
        shape: the step's shape.
        commit_slots: [C] from `write_slots`.
        path: [B, D + 1] accepted nodes from the root on (`Acceptance.path`).
        length: [B] how many of them behind the root were accepted.

    Returns:
        ``(source, slots)``, each [C] int64: the place among the step's E writes that holds the
        K/V, and the slot it goes to or `PAD_SLOT`.

    """
    req, offset = shape.slot_req[shape.num_writes :], shape.slot_offset[shape.num_writes :]
    source = shape.node_write[req, path[req, offset]]
    accepted = offset <= length.index_select(0, req)
    return source, commit_slots.where(accepted, PAD_SLOT)


def mirror_copies(
    num_paths: int, geometry: ForkGeometry, tail_block: Tensor, block_idx: Tensor, fork_base: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the whole-block copies that put requests' tails into their first forks.

    Args:
        num_paths: how many fork paths are to find the tail in place, the first one included.
        geometry: layout of the forks in this KV-cache group.
        tail_block: [M] block that holds each request's partial tail.
        block_idx: [M] its index in the request's block table.
        fork_base: [M] first fork block of each request.

    Returns:
        ``(source, destination)``, each [M * (num_paths - 1)] int64 block ids.

    """
    paths = torch.arange(1, num_paths, device=tail_block.device)
    destination = geometry.block(fork_base[:, None], paths, block_idx[:, None])
    source = tail_block.to(torch.int64)[:, None].expand_as(destination)
    return source.flatten(), destination.flatten()
