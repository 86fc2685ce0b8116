"""How many tokens steps emit along the target's answers, by the ranks that the heads gave them.

The input everywhere is a list of rank tables, one for each answer. A table is an int array
[positions, heads]: at every position of the answer that counts (`texts.counted_positions`), the
rank that each head gave the token that then came. Position p's root is token p of the answer, and
head k guesses token p + 1 + k. A rank of `RANK_CAP` or more is a miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllm_medusa.tree.draft_tree import TreePath

Ranks: TypeAlias = NDArray[np.integer[Any]]

#: Ranks from here on are misses: no tree of 127 nodes has use for them.
RANK_CAP = 32


def accepted_drafts(ranks: Ranks, paths: Sequence[TreePath]) -> NDArray[np.int64]:
    """Return [positions]: the draft tokens that a step beginning there would accept.

    Args:
        ranks: [positions, heads].
        paths: a draft tree's; may be empty.

    """
    children = _children(paths)
    node = np.zeros(len(ranks), dtype=np.int64)
    accepted = np.zeros(len(ranks), dtype=np.int64)
    for depth in range(ranks.shape[1]):
        node = children[node, np.minimum(ranks[:, depth], RANK_CAP)]
        accepted += node >= 0
    return accepted


def step_counts(tables: Sequence[Ranks], paths: Sequence[TreePath]) -> NDArray[np.int64]:
    """Return [answers, 2]: tokens emitted and steps taken along each answer.

    This is what the engine does: the first step's root is token 0, which the prompt's own step
    emits; a step emits its accepted drafts and one token more, and the last of them is the next
    step's root. A step that begins at a position counts in full, even if it ends beyond the last.
    """
    lengths = np.array([len(ranks) for ranks in tables], dtype=np.int64)
    counts = np.zeros((len(tables), 2), dtype=np.int64)
    if not lengths.sum():
        return counts
    emitted = 1 + accepted_drafts(joined(tables), paths)
    starts = np.cumsum(lengths) - lengths
    position = np.zeros(len(tables), dtype=np.int64)
    # All answers step at once; each stops at its end.
    while len(live := np.flatnonzero(position < lengths)):
        tokens = emitted[starts[live] + position[live]]
        counts[live, 0] += tokens
        counts[live, 1] += 1
        position[live] += tokens
    return counts


def simulate(tables: Sequence[Ranks], paths: Sequence[TreePath]) -> float:
    """Return the acceptance length, tokens per step, by exact simulation (see `step_counts`).

    It differs from `position_average`: after a step that accepted much the next one begins further
    on, so steps begin more often where little is accepted. Without any position it is 1.
    """
    tokens, steps = step_counts(tables, paths).sum(axis=0).tolist()
    return float(tokens / steps) if steps else 1.0


def position_average(tables: Sequence[Ranks], paths: Sequence[TreePath]) -> float:
    """Return the acceptance length if steps began at all positions alike.

    It is one plus the sum of the nodes' probabilities, which `best_paths` maximises.
    """
    ranks = joined(tables)
    return 1 + float(accepted_drafts(ranks, paths).mean()) if len(ranks) else 1.0


def head_accuracy(
    tables: Sequence[Ranks], tops: Sequence[int] = (1, 2, 5, 10)
) -> dict[int, list[float]]:
    """Return by top n the share of positions at which each head had the token among its first n.

    Misses are not told apart: near the end of an answer there is nothing to guess for the last
    heads, so short answers lower their share.
    """
    ranks = joined(tables)
    shares = {top: (ranks < top).sum(axis=0) / max(1, len(ranks)) for top in tops}
    return {top: share.tolist() for top, share in shares.items()}


def joined(tables: Sequence[Ranks]) -> Ranks:
    """Return the positions of all tables: [sum of positions, heads]."""
    if not tables:
        return np.zeros((0, 0), dtype=np.int64)
    return np.concatenate([np.asarray(ranks) for ranks in tables])


def _children(paths: Sequence[TreePath]) -> NDArray[np.int64]:
    """Node reached from each node by each rank: [nodes + 1, RANK_CAP + 1]; -1, which is also the
    last row, is the end of the walk, and so is the last column, a miss.
    """
    index = {path: node for node, path in enumerate(paths, start=1)} | {(): 0}
    children = np.full((len(index) + 1, RANK_CAP + 1), -1, dtype=np.int64)
    for path, node in index.items():
        if path and path[-1] < RANK_CAP:
            children[index[path[:-1]], path[-1]] = node
    return children
