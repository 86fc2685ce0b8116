"""Best-first trees: each request's likeliest nodes by the heads' own probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class RankPaths:
    """S rank paths that trees are chosen from, parents before children; D is the deepest.

    What the heads guess comes in T tables: of Medusa heads one for each head, of heads with a
    selector one for each path that has children.

    Attributes:
        tables: [D, S] int32, table of the path's guess at each depth; 0 behind its end.
        ranks: [D, S] int32, the path's rank among the guesses of that table; -1 behind its end.
        parents: [S] int32, place of the path without its last rank; -1 is the root.

    """

    tables: Tensor
    ranks: Tensor
    parents: Tensor

    @classmethod
    def build(
        cls,
        paths: Sequence[Sequence[int]],
        tables: Sequence[int],
        device: torch.device | str,
    ) -> RankPaths:
        """Make the tensors.

        Args:
            paths: each one's parent comes before it.
            tables: [S] table of each path's last guess.
            device: of the tensors.

        """
        place = {tuple(path): i for i, path in enumerate(paths)} | {(): -1}
        parents = [place[tuple(path[:-1])] for path in paths]
        assert all(parent < i for i, parent in enumerate(parents))
        depth = max(map(len, paths))
        on_way: list[list[int]] = []
        for parent, table in zip(parents, tables, strict=True):
            on_way.append([*(on_way[parent] if parent >= 0 else []), table])

        def by_depth(rows: Sequence[Sequence[int]], behind: int) -> Tensor:
            filled = [[*row, *[behind] * (depth - len(row))] for row in rows]
            return torch.tensor(filled, dtype=torch.int32, device=device).T.contiguous()

        return cls(
            by_depth(on_way, 0),
            by_depth(paths, -1),
            torch.tensor(parents, dtype=torch.int32, device=device),
        )


@triton.jit
def _scores(
    path,
    log_probs_ptr,
    stride_table,
    tables_ptr,
    ranks_ptr,
    NUM_PATHS: tl.constexpr,
    MAX_DEPTH: tl.constexpr,
):
    """Log-probabilities of paths and of their parents, and the offset of the last guess."""
    is_path = path < NUM_PATHS
    score = tl.where(is_path, 0.0, float("-inf"))
    above = score
    last = path * 0
    for depth in range(MAX_DEPTH):
        place = depth * NUM_PATHS + path
        rank = tl.load(ranks_ptr + place, mask=is_path, other=-1)
        is_step = rank >= 0
        guess = tl.load(tables_ptr + place, mask=is_path, other=0) * stride_table + rank
        value = tl.load(log_probs_ptr + guess, mask=is_step, other=0.0)
        above = tl.where(is_step, score, above)
        # Never likelier than its parent, whatever rounding (or a NaN) says.
        score += tl.where(value < 0, value, 0.0)
        last = tl.where(is_step, guess, last)
    return score, above, last


@triton.jit
def _best_first_kernel(
    tokens_ptr,
    parents_ptr,
    log_probs_ptr,
    guesses_ptr,
    stride_table,
    stride_req,
    tables_ptr,
    ranks_ptr,
    path_parents_ptr,
    NUM_PATHS: tl.constexpr,
    NUM_NODES: tl.constexpr,
    MAX_DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    req = tl.program_id(0)
    log_probs = log_probs_ptr + req * stride_req
    path = tl.arange(0, BLOCK)
    parent = tl.load(path_parents_ptr + path, mask=path < NUM_PATHS, other=-1)
    score, above, last = _scores(
        path, log_probs, stride_table, tables_ptr, ranks_ptr, NUM_PATHS, MAX_DEPTH
    )
    place = tl.zeros([BLOCK], dtype=tl.int32)
    parent_place = tl.zeros([BLOCK], dtype=tl.int32)
    # A path's place is how many come before it. Of equals the first counts as the likelier, so
    # that a parent always comes before its children.
    for start in range(0, BLOCK, CHUNK):
        other = start + tl.arange(0, CHUNK)
        rival, _, _ = _scores(
            other, log_probs, stride_table, tables_ptr, ranks_ptr, NUM_PATHS, MAX_DEPTH
        )
        beats = (rival[None, :] > score[:, None]) | (
            (rival[None, :] == score[:, None]) & (other[None, :] < path[:, None])
        )
        place += tl.sum(beats.to(tl.int32), axis=1)
        beats = (rival[None, :] > above[:, None]) | (
            (rival[None, :] == above[:, None]) & (other[None, :] < parent[:, None])
        )
        parent_place += tl.sum(beats.to(tl.int32), axis=1)
    is_chosen = place < NUM_NODES
    is_path = path < NUM_PATHS
    guess = tl.load(guesses_ptr + req * stride_req + last, mask=is_path & is_chosen, other=0)
    tl.store(tokens_ptr + req * NUM_NODES + place, guess, mask=is_chosen)
    node = tl.where(parent >= 0, parent_place + 1, 0)
    row = parents_ptr + req * (NUM_NODES + 1)
    tl.store(row, 0)
    tl.store(row + 1 + place, tl.where(is_path, node, -1), mask=is_chosen)


def best_first(
    log_probs: Tensor, guesses: Tensor, paths: RankPaths, num_nodes: int
) -> tuple[Tensor, Tensor]:
    """Choose each request's N likeliest nodes; a node is as likely as its path's product.

    The nodes come in falling probability, equals in the order of ``paths``; so a parent comes
    before its children, and the first nodes, however many, are a tree.

    Args:
        log_probs: [T, B, k] float32 log-probabilities of each table's guesses; above 0 counts as 0.
        guesses: [T, B, k] int64 tokens of the guesses.
        paths: whose tables are below T and ranks below k.
        num_nodes: N.

    Returns:
        [B, N + 1] int64 parent of each node, the root's 0, for `trees.set_trees`, and [B, N]
        int64 tokens. If there are fewer than N paths, the last nodes have parent -1 and token 0.

    """
    depth, num_paths = paths.ranks.shape
    num_reqs = log_probs.shape[1]
    log_probs, guesses = log_probs.contiguous(), guesses.contiguous()
    parents = guesses.new_empty(num_reqs, num_nodes + 1)
    tokens = guesses.new_empty(num_reqs, num_nodes)
    block = triton.next_power_of_2(max(num_paths, num_nodes))
    if num_reqs:
        _best_first_kernel[(num_reqs,)](
            tokens,
            parents,
            log_probs,
            guesses,
            log_probs.stride(0),
            log_probs.stride(1),
            paths.tables,
            paths.ranks,
            paths.parents,
            NUM_PATHS=num_paths,
            NUM_NODES=num_nodes,
            MAX_DEPTH=depth,
            BLOCK=block,
            CHUNK=min(block, 32),
        )
    return parents, tokens
