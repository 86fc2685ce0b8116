"""The pseudo-sequences, writes and commits of a step with forks (`forks` says what they are)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_medusa.tree.step_trees import IntArray, StepTrees


@dataclass(frozen=True)
class ForkIndices:
    """The indices of one step that do not depend on where in the cache its requests are.

    B requests run T tokens as Q pseudo-sequences and write K/V to E slots. A commit writes to C
    further slots at most. It goes to forks too that hold a request's tail but run nothing in this
    step: together with them there are S rows of block tables, F of them with fork blocks.

    Attributes:
        token_req: [T] request of each token.
        token_offset: [T] position of each token, from the request's number of computed tokens.
        seq_req: [Q] request of each pseudo-sequence.
        seq_length: [Q] its length, from the request's number of computed tokens.
        query_start_loc: [Q + 1] int32, first token of each pseudo-sequence.
        row_req: [S] request of each row of block tables; the pseudo-sequences come first.
        fork_rows: [F] the rows of paths other than the first.
        fork_req: [F] their requests.
        fork_path: [F] their fork paths.
        write_token: [E] token whose K/V is written.
        slot_row: [E + C] the row to whose blocks a write goes; the commit's writes follow the
            step's own.
        slot_offset: [E + C] the write's position, from the request's number of computed tokens.
        commit_req: [C] request of each of the commit's writes.
        node_write: [B, N + 1] a place among the E that holds each node; 0 for nodes not run.

    """

    token_req: Tensor
    token_offset: Tensor
    seq_req: Tensor
    seq_length: Tensor
    query_start_loc: Tensor
    row_req: Tensor
    fork_rows: Tensor
    fork_req: Tensor
    fork_path: Tensor
    write_token: Tensor
    slot_row: Tensor
    slot_offset: Tensor
    commit_req: Tensor
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
    def num_forked(self) -> int:
        """How many requests run more than one fork path."""
        return int((self.num_paths > 1).sum())

    @cached_property
    def num_forks(self) -> int:
        """Number of fork paths other than the requests' first."""
        return int((self.num_paths - 1).sum())

    @cached_property
    def mirrored(self) -> list[tuple[int, int]]:
        """The requests with forks that hold their tail after the commit, each with `num_live`."""
        return [(req, live) for req, live in enumerate(self.num_live.tolist()) if live > 1]

    @cached_property
    def without_mirrors(self) -> IntArray:
        """The requests that run more fork paths than hold their tail."""
        return np.flatnonzero(self.num_paths > self.num_mirrored)


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
    tokens = _tokens(trees, runs_tree, num_tokens)
    seqs = _sequences(tokens, len(num_tokens))
    # A request that runs a prompt has no mirrors; one that decodes keeps those it has.
    keeps = runs_tree | (num_tokens == 1)
    num_live = np.where(keeps, np.maximum(seqs.num_paths, num_mirrored), 1)
    if not ((num_live > 1) & runs_tree).any():
        return None
    host = _indices(trees, runs_tree, num_tokens, tokens, seqs, num_live)
    return ForkStep(
        host=host,
        device=host.to(torch.device(device)),
        num_tokens=num_tokens,
        num_paths=seqs.num_paths,
        num_mirrored=num_mirrored,
        num_live=num_live,
        max_query_len=int(np.diff(seqs.start, append=len(tokens.req)).max()),
    )


def _indices(
    trees: StepTrees,
    runs_tree: NDArray[np.bool_],
    num_tokens: IntArray,
    tokens: _Tokens,
    seqs: _Sequences,
    num_live: IntArray,
) -> ForkIndices:
    rows = _rows(seqs, num_live)
    writes = _writes(trees, runs_tree, seqs)
    commits = _commits(seqs, rows, num_live)
    node_write = np.zeros_like(trees.parents)
    holds = runs_tree[writes.req] | (writes.offset == 0)
    node_write[writes.req[holds], writes.node[holds]] = np.flatnonzero(holds)
    forks = np.flatnonzero(rows.path)
    return ForkIndices(
        token_req=_tensor(tokens.req),
        token_offset=_tensor(tokens.offset),
        seq_req=_tensor(seqs.req),
        seq_length=_tensor(seqs.length),
        query_start_loc=_tensor(np.append(seqs.start, len(tokens.req))).to(torch.int32),
        row_req=_tensor(rows.req),
        fork_rows=_tensor(forks),
        fork_req=_tensor(rows.req[forks]),
        fork_path=_tensor(rows.path[forks]),
        write_token=_tensor(_starts(num_tokens)[writes.req] + writes.node),
        slot_row=_tensor(np.concatenate((writes.seq, commits.row))),
        slot_offset=_tensor(np.concatenate((writes.offset, commits.offset))),
        commit_req=_tensor(rows.req[commits.row]),
        node_write=_tensor(node_write),
    )


@dataclass(frozen=True)
class _Tokens:
    """[T] a step's tokens: request, place among the request's, offset, place of the parent."""

    req: IntArray
    place: IntArray
    offset: IntArray
    parent: IntArray


def _tokens(trees: StepTrees, runs_tree: NDArray[np.bool_], num_tokens: IntArray) -> _Tokens:
    req = np.repeat(np.arange(len(num_tokens)), num_tokens)
    place = np.arange(len(req)) - _starts(num_tokens)[req]
    in_tree = runs_tree[req]
    node = np.where(in_tree, place, 0)
    return _Tokens(
        req=req,
        place=place,
        offset=np.where(in_tree, trees.depths[req, node], place),
        parent=np.where(in_tree, trees.parents[req, node], place - 1),
    )


@dataclass(frozen=True)
class _Sequences:
    """The pseudo-sequences of B requests.

    Attributes:
        req, path: [Q] request and fork path of each.
        start: [Q] its first token.
        last: [Q] place of its last token among the request's.
        length: [Q] its length, from the request's number of computed tokens.
        num_paths: [B] pseudo-sequences of each request.

    """

    req: IntArray
    path: IntArray
    start: IntArray
    last: IntArray
    length: IntArray
    num_paths: IntArray


def _sequences(tokens: _Tokens, num_requests: int) -> _Sequences:
    """Begin one wherever a token's parent is not the token before it."""
    start = np.flatnonzero((tokens.place == 0) | (tokens.parent != tokens.place - 1))
    end = np.append(start[1:], len(tokens.req)) - 1
    req = tokens.req[start]
    num_paths = np.bincount(req, minlength=num_requests)
    return _Sequences(
        req=req,
        path=np.arange(len(req)) - _starts(num_paths)[req],
        start=start,
        last=tokens.place[end],
        length=tokens.offset[end] + 1,
        num_paths=num_paths,
    )


def _tensor(values: IntArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


@dataclass(frozen=True)
class _Writes:
    """[E] a step's writes: pseudo-sequence, request, node (or token's place) and offset."""

    seq: IntArray
    req: IntArray
    node: IntArray
    offset: IntArray


def _writes(trees: StepTrees, runs_tree: NDArray[np.bool_], seqs: _Sequences) -> _Writes:
    """Write each pseudo-sequence's whole way from the root, not only what it adds."""
    seq = np.repeat(np.arange(len(seqs.req)), seqs.length)
    req = seqs.req[seq]
    offset = np.arange(len(seq)) - _starts(seqs.length)[seq]
    in_tree = runs_tree[req]
    last = np.where(in_tree, seqs.last[seq], 0)
    on_way = trees.ancestors[req, last, np.minimum(offset, trees.depth)]
    return _Writes(seq, req, np.where(in_tree, on_way, offset), offset)


@dataclass(frozen=True)
class _Rows:
    """[S] the rows of block tables: request and fork path of each."""

    req: IntArray
    path: IntArray


def _rows(seqs: _Sequences, num_live: IntArray) -> _Rows:
    """Add the paths that hold a request's tail to those that run."""
    num_kept = np.maximum(num_live - seqs.num_paths, 0)
    req = np.repeat(np.arange(len(num_live)), num_kept)
    path = np.arange(len(req)) - _starts(num_kept)[req] + seqs.num_paths[req]
    return _Rows(np.append(seqs.req, req), np.append(seqs.path, path))


@dataclass(frozen=True)
class _Commits:
    """[C] where a commit may write: row of block tables and offset."""

    row: IntArray
    offset: IntArray


def _commits(seqs: _Sequences, rows: _Rows, num_live: IntArray) -> _Commits:
    """Write what is accepted to all live paths; the step has the root in those that it ran."""
    deepest = np.zeros_like(num_live)
    np.maximum.at(deepest, seqs.req, seqs.length - 1)
    kept = np.flatnonzero((num_live > 1)[rows.req])
    has_root = kept < len(seqs.req)
    counts = deepest[rows.req[kept]] + ~has_root
    place = np.repeat(np.arange(len(kept)), counts)
    offset = np.arange(len(place)) - _starts(counts)[place] + has_root[place]
    return _Commits(kept[place], offset)


def _starts(counts: IntArray) -> IntArray:
    """Exclusive cumulative sums."""
    starts: IntArray = np.cumsum(counts) - counts
    return starts
