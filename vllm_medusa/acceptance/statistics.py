"""How many tokens steps emit along the target's answers, given the ranks of the right tokens.

The input everywhere is a list of rank tables, one for each answer. A table is an int array
[positions, heads]: at every position of the answer that counts (`texts.counted_positions`), the
rank that each head gave to the right token. Position p's root is token p of the answer, and
head k guesses token p + 1 + k. A rank of `RANK_CAP` or more is a miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllm_medusa.tree.draft_tree import TreePath

Ranks: TypeAlias = NDArray[np.integer[Any]]

#: Ranks from this one on are misses: no tree of 127 nodes would use them.
RANK_CAP = 32


def accepted_drafts(ranks: Ranks, paths: Sequence[TreePath]) -> NDArray[np.int64]:
    """Return [positions]: the draft tokens that a step beginning there would accept.

    Args:
        ranks: [positions, heads].
        paths: paths of a draft tree; may be empty.

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

    As in the engine, the first step's root is token 0, which the prompt's own step emits. A step
    emits its accepted drafts and one more token, and the last of them is the next step's root. A
    step that begins at a position counts completely, even if it ends after the last position.
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

    It differs from `position_average`: after a step that accepts many tokens the next one begins
    further on, so steps begin more often where few tokens are accepted. Without positions it is 1.
    """
    tokens, steps = step_counts(tables, paths).sum(axis=0).tolist()
    return float(tokens / steps) if steps else 1.0


def position_average(tables: Sequence[Ranks], paths: Sequence[TreePath]) -> float:
    """Return the acceptance length if steps began equally often at all positions.

    It is one plus the sum of the nodes' probabilities, which `best_paths` maximises.
    """
    ranks = joined(tables)
    return 1 + float(accepted_drafts(ranks, paths).mean()) if len(ranks) else 1.0


def head_accuracy(
    tables: Sequence[Ranks], tops: Sequence[int] = (1, 2, 5, 10)
) -> dict[int, list[float]]:
    """Return for each n the share of positions at which the token is among a head's first n.

    All misses count the same: near the end of an answer the last heads have nothing to guess, so
    short answers lower their share.
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
    """Return [nodes + 1, RANK_CAP + 1]: the node reached from each node by each rank.

    -1 is the end of the walk. It is also the index of the last row; the last column is a miss.
    """
    index = {path: node for node, path in enumerate(paths, start=1)} | {(): 0}
    children = np.full((len(index) + 1, RANK_CAP + 1), -1, dtype=np.int64)
    for path, node in index.items():
        if path and path[-1] < RANK_CAP:
            children[index[path[:-1]], path[-1]] = node
    return children
