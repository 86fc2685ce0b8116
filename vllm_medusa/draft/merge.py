"""One tree per request out of what all sources propose.

Equal tokens under one parent are one node, and of their probabilities the largest counts. The
heads' candidates are a `Superset`; those of other sources walk it depth by depth, and what leaves
it hangs below the last node that they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_medusa.draft.superset import Superset
from vllm_medusa.draft.types import Candidates, Floats, Guesses, Ints, Source


@dataclass(frozen=True)
class Nodes:
    """The merged trees of B requests, in no particular order: n nodes in all.

    Each node has an *id* below `num_ids`; ids have gaps.

    Attributes:
        ids: [n].
        parents: [n] id of each node's parent; -1 is the request's root.
        request, tokens, depths: [n].
        probability: [n] that the text goes through the node; falls along each path.
        source: [n] bits of `Source`.
        num_ids: ids are below this.

    """

    ids: Ints
    parents: Ints
    request: Ints
    tokens: Ints
    depths: Ints
    probability: Floats
    source: Ints
    num_ids: int


def merge(
    superset: Superset, guesses: Guesses | None, proposals: Sequence[Candidates], pool: int
) -> Nodes:
    """Merge the candidates of all sources.

    Args:
        superset: the rank paths of the heads' candidates.
        guesses: of the heads, for all B requests; None if they did not run.
        proposals: of the other sources.
        pool: so many of a request's nodes on the superset are kept, the likeliest, and none that
            is less likely than they.

    """
    others = join(proposals)
    if guesses is None or len(superset) == 0 or len(guesses.tokens) == 0:
        return _without_heads(others)
    hosts = _walk(superset, guesses, others)
    size, num_requests = len(superset), len(guesses.tokens)
    given, source = _on_superset(superset, guesses, others, hosts)
    paths = _path_probabilities(superset, given)
    other_paths = _other_path_probabilities(others, hosts, paths)

    row, column = _likeliest(paths[:, :size], pool)
    floor = paths[row, column].reshape(num_requests, -1).min(axis=1) if pool < size else None
    keep = hosts < 0 if floor is None else (hosts < 0) & (other_paths > floor[others.request])
    new = np.flatnonzero(keep)
    above = superset.parents[column]
    return Nodes(
        ids=np.concatenate([row * size + column, num_requests * size + new]),
        parents=np.concatenate(
            [
                np.where(above == size, -1, row * size + above),
                _parent_ids(others, hosts, new, size, num_requests),
            ]
        ),
        request=np.concatenate([row, others.request[new]]),
        tokens=np.concatenate(
            [
                guesses.tokens.reshape(num_requests, -1)[row, superset.cells[column]],
                others.tokens[new],
            ]
        ),
        depths=np.concatenate([superset.depths[column], others.depths[new]]),
        probability=np.concatenate([paths[row, column], other_paths[new]]),
        source=np.concatenate([source[row, column], others.source[new]]),
        num_ids=num_requests * size + len(others.tokens),
    )


def join(proposals: Sequence[Candidates]) -> Candidates:
    """Merge the candidates of sources other than the heads."""
    if len(proposals) == 1:
        return proposals[0]
    num_tokens = 1 + max((int(p.tokens.max()) for p in proposals if len(p.tokens)), default=0)
    # Of each proposal: the place of each of its nodes in the result.
    places = [np.zeros(len(p.tokens), dtype=np.int64) for p in proposals]
    parts: list[tuple[Ints, Ints, Ints, Floats, Ints]] = []
    levels = [0]
    for depth in range(1, 1 + max((p.depth for p in proposals), default=0)):
        at = [(i, p, p.level(depth)) for i, p in enumerate(proposals) if depth <= p.depth]
        request = np.concatenate([p.request[level] for _, p, level in at])
        tokens = np.concatenate([p.tokens[level] for _, p, level in at])
        if depth == 1:
            parents = np.full(len(tokens), -1)
            key = request
        else:
            parents = np.concatenate([places[i][p.parents[level]] for i, p, level in at])
            key = parents
        _, first, inverse = np.unique(
            key * num_tokens + tokens, return_index=True, return_inverse=True
        )
        probability = np.zeros(len(first))
        np.maximum.at(
            probability, inverse, np.concatenate([p.probability[level] for _, p, level in at])
        )
        source = np.zeros(len(first), dtype=np.int64)
        np.bitwise_or.at(source, inverse, np.concatenate([p.source[level] for _, p, level in at]))
        parts.append((request[first], parents[first], tokens[first], probability, source))
        split = np.cumsum([level.stop - level.start for _, _, level in at])[:-1]
        for (i, _, level), place in zip(at, np.split(inverse, split), strict=True):
            places[i][level] = levels[-1] + place
        levels.append(levels[-1] + len(first))
    if not parts:
        return Candidates.none()
    request, parents, tokens, probability, source = (
        np.concatenate(column) for column in zip(*parts, strict=True)
    )
    return Candidates(request, parents, tokens, probability, source, np.array(levels))


def _walk(superset: Superset, guesses: Guesses, others: Candidates) -> Ints:
    """[n] place of each candidate on the superset, -1 for those that are not on it."""
    root, nowhere = len(superset), -1
    hosts = np.full(len(others.tokens), nowhere, dtype=np.int64)
    for depth in range(1, 1 + min(others.depth, superset.num_heads)):
        level = others.level(depth)
        guessed = guesses.tokens[others.request[level], depth - 1]
        is_guess = guessed == others.tokens[level, None]
        above = hosts[others.parents[level]] if depth > 1 else root
        place = superset.children[above, is_guess.argmax(axis=1)]
        hosts[level] = np.where(is_guess.any(axis=1), place, nowhere)
    return hosts


def _on_superset(
    superset: Superset, guesses: Guesses, others: Candidates, hosts: Ints
) -> tuple[Floats, Ints]:
    """[B, S] probability given the parent and [B, S] source of all paths of the superset."""
    num_requests = len(guesses.tokens)
    given = guesses.probability.reshape(num_requests, -1)[:, superset.cells]
    source = np.full(given.shape, int(Source.HEADS))
    shared = np.flatnonzero(hosts >= 0)
    where = (others.request[shared], hosts[shared])
    given[where] = np.maximum(given[where], others.probability[shared])
    source[where] |= others.source[shared]
    return given, source


def _path_probabilities(superset: Superset, given: Floats) -> Floats:
    """[B, S + 1] that the text goes through each path; 1 for the root, the last."""
    paths = np.ones((len(given), len(superset) + 1))
    for depth in range(1, superset.num_heads + 1):
        level = slice(superset.levels[depth - 1], superset.levels[depth])
        paths[:, level] = paths[:, superset.parents[level]] * given[:, level]
    return paths


def _other_path_probabilities(others: Candidates, hosts: Ints, paths: Floats) -> Floats:
    """[n] that the text goes through each candidate of the other sources."""
    # The last place stands for the root.
    result = np.ones(len(others.tokens) + 1)
    for depth in range(1, others.depth + 1):
        level = others.level(depth)
        result[level] = result[others.parents[level]] * others.probability[level]
        if depth < paths.shape[1]:
            on = hosts[level]
            result[level] = np.where(on >= 0, paths[others.request[level], on], result[level])
    return result[:-1]


def _likeliest(paths: Floats, pool: int) -> tuple[Ints, Ints]:
    """Row and column of the ``pool`` largest of each row [B, S]."""
    size = paths.shape[1]
    if pool >= size:
        columns = np.broadcast_to(np.arange(size), paths.shape)
    else:
        columns = np.argpartition(paths, size - pool, axis=1)[:, size - pool :]
    rows = np.repeat(np.arange(len(paths)), columns.shape[1])
    return rows, columns.ravel()


def _parent_ids(others: Candidates, hosts: Ints, new: Ints, size: int, num_requests: int) -> Ints:
    """Ids of the parents of the candidates ``new``, which are not on the superset."""
    above = others.parents[new]
    host = hosts[above]
    ids = np.where(host >= 0, others.request[new] * size + host, num_requests * size + above)
    return np.where(above < 0, -1, ids)


def _without_heads(others: Candidates) -> Nodes:
    paths = np.ones(len(others.tokens) + 1)
    for depth in range(1, others.depth + 1):
        level = others.level(depth)
        paths[level] = paths[others.parents[level]] * others.probability[level]
    return Nodes(
        ids=np.arange(len(others.tokens)),
        parents=others.parents,
        request=others.request,
        tokens=others.tokens,
        depths=others.depths,
        probability=paths[:-1],
        source=others.source,
        num_ids=len(others.tokens),
    )
