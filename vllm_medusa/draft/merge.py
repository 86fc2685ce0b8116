"""One tree per request from the candidates of all sources.

Equal tokens below one parent are one node. The heads' candidates are a `Superset`. The candidates
of other sources are matched with it depth by depth; those that are not on it are added below the
last common node. Where both propose tokens, the probabilities are those of `agreement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_medusa.draft.agreement import Agreed, Agreement, agree
from vllm_medusa.draft.compiled import along_paths, compiled
from vllm_medusa.draft.superset import Superset
from vllm_medusa.draft.types import Candidates, Floats, Guesses, Ints, Source

_HEADS = int(Source.HEADS)


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
    superset: Superset,
    guesses: Guesses | None,
    others: Candidates,
    pool: int,
    agreement: Agreement,
) -> Nodes:
    """Merge the candidates of all sources.

    Args:
        superset: the rank paths of the heads' candidates.
        guesses: of the heads, for all B requests; None if they did not run.
        others: of the other sources, joined.
        pool: number of a request's most probable nodes on the superset that are kept. No less
            probable candidate is kept either.
        agreement: gives probabilities where heads and others both propose tokens, and keeps them
            to learn from.

    """
    if guesses is None or len(superset) == 0 or len(guesses.tokens) == 0:
        return _without_heads(others)
    ids, parents, request, tokens, depths, probability, source, agreed = _merged(
        *(superset.parents, superset.children, superset.tables, superset.cells),
        superset.depths,
        guesses.tokens,
        guesses.probability,
        *(others.request, others.parents, others.tokens),
        others.probability,
        others.source,
        *(agreement.curve.slopes, agreement.curve.bias),
        pool,
    )
    agreement.keep(guesses, others, agreed)
    num_ids = len(guesses.tokens) * len(superset) + len(others.tokens)
    return Nodes(ids, parents, request, tokens, depths, probability, source, num_ids)


def join(proposals: Sequence[Candidates]) -> Candidates:
    """Merge the candidates of sources other than the heads."""
    if len(proposals) == 1:
        return proposals[0]
    num_tokens = 1 + max((int(p.tokens.max()) for p in proposals if len(p.tokens)), default=0)
    # For each proposal the place of each of its nodes in the result.
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


@compiled
def _merged(
    parents: Ints,
    children: Ints,
    tables: Ints,
    cells: Ints,
    superset_depths: Ints,
    guesses: Ints,
    guessed: Floats,
    request: Ints,
    other_parents: Ints,
    other_tokens: Ints,
    other_given: Floats,
    other_source: Ints,
    slopes: Floats,
    bias: Floats,
    pool: int,
) -> tuple[Ints, Ints, Ints, Ints, Ints, Floats, Ints, Agreed]:
    """Return the arrays of `Nodes` of heads and other sources, and what the agreement curve gave.

    Args:
        parents, children, tables, cells, superset_depths: of the superset.
        guesses, guessed: [B, T, k] tokens of the heads and their probabilities.
        request, other_parents, other_tokens, other_given, other_source: of `Candidates`.
        slopes, bias: of the agreement curve.
        pool: as in `merge`.

    """
    size, num_requests, num_guesses = len(parents), guesses.shape[0], guesses.shape[2]
    source = np.full((num_requests, size), _HEADS)
    given = np.ones((num_requests, size + 1))  # the last is the root's, which stays 1
    for row in range(num_requests):
        for place, cell in enumerate(cells):
            given[row, place] = guessed[row, cell // num_guesses, cell % num_guesses]
    hosts, beside, other_depths = _match(
        *(children, tables, guesses, source),
        *(request, other_parents, other_tokens, other_source),
    )
    agreed = agree(parents, given, request, hosts, beside, other_given, slopes, bias)
    paths, other_paths = _along(parents, agreed, request, hosts, other_parents)
    rows, columns, new, ids, above = _choose(
        parents, paths, hosts, other_paths, request, other_parents, pool
    )
    num_nodes = len(ids)
    requests, tokens = np.empty(num_nodes, np.int64), np.empty(num_nodes, np.int64)
    depths, sources = np.empty(num_nodes, np.int64), np.empty(num_nodes, np.int64)
    probability = np.empty(num_nodes)
    for node in range(num_nodes):
        if node < len(rows):
            row, column = rows[node], columns[node]
            cell = cells[column]
            requests[node], depths[node] = row, superset_depths[column]
            tokens[node] = guesses[row, cell // num_guesses, cell % num_guesses]
            probability[node], sources[node] = paths[row, column], source[row, column]
        else:
            other = new[node - len(rows)]
            requests[node], depths[node] = request[other], other_depths[other]
            tokens[node] = other_tokens[other]
            probability[node], sources[node] = other_paths[other], other_source[other]
    return ids, above, requests, tokens, depths, probability, sources, agreed


@compiled
def _match(
    children: Ints,
    tables: Ints,
    guesses: Ints,
    source: Ints,
    request: Ints,
    other_parents: Ints,
    other_tokens: Ints,
    other_source: Ints,
) -> tuple[Ints, Ints, Ints]:
    """Find the n candidates of the other sources on the superset [S].

    Args:
        children, tables: of the superset.
        guesses: [B, T, k] tokens of the heads.
        source: [B, S] sources of each path; those of the candidates are added.
        request, other_parents, other_tokens, other_source: [n] of the candidates.

    Returns:
        [n] place of each candidate on the superset, [n] place of its parent there, S for the root,
        both -1 for those that are not on it, and [n] the depth of each candidate.

    """
    size, num_others = source.shape[1], len(request)
    hosts, beside = np.full(num_others, -1), np.full(num_others, -1)
    depths = np.ones(num_others, dtype=np.int64)
    for node in range(num_others):
        above, row = other_parents[node], request[node]
        if above >= 0:
            depths[node] = depths[above] + 1
        host = hosts[above] if above >= 0 else size
        if host < 0 or depths[node] > len(tables):
            continue
        beside[node] = host
        table = tables[depths[node] - 1, host]
        if table < 0:
            continue
        for rank in range(guesses.shape[2]):
            if guesses[row, table, rank] == other_tokens[node]:
                hosts[node] = host = children[host, rank]
                if host >= 0:
                    source[row, host] |= other_source[node]
                break
    return hosts, beside, depths


@compiled
def _along(
    parents: Ints, agreed: Agreed, request: Ints, hosts: Ints, other_parents: Ints
) -> tuple[Floats, Floats]:
    """Return the path probabilities: [B, S + 1] on the superset and [n] of other candidates.

    Args:
        parents: [S] of the superset.
        agreed: the probabilities given the parents.
        request, hosts, other_parents: [n] of the candidates.

    """
    paths, other_paths = agreed.heads.copy(), agreed.others.copy()
    for row in range(len(paths)):
        for place in range(len(parents)):
            paths[row, place] *= paths[row, parents[place]]
    for node in range(len(hosts)):
        above = other_parents[node]
        if hosts[node] >= 0:
            other_paths[node] = paths[request[node], hosts[node]]
        elif above >= 0:
            other_paths[node] *= other_paths[above]
    return paths, other_paths


@compiled
def _largest(probability: Floats, place: int) -> float:
    """Return the ``place``-th largest of some probabilities; numpy's way takes long to compile."""
    largest = np.zeros(place)  # in falling order
    for value in probability:
        behind = place - 1
        while behind >= 0 and largest[behind] < value:
            if behind + 1 < place:
                largest[behind + 1] = largest[behind]
            behind -= 1
        if behind + 1 < place:
            largest[behind + 1] = value
    return float(largest[place - 1])


@compiled
def _choose(
    parents: Ints,
    paths: Floats,
    hosts: Ints,
    other_paths: Floats,
    request: Ints,
    other_parents: Ints,
    pool: int,
) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """Choose the likeliest nodes of each request.

    Args:
        parents: [S] of the superset.
        paths: [B, S + 1] path probability of each path.
        hosts, other_paths: [n] of the candidates, as `_match` and `_along` return them.
        request, other_parents: [n] of the candidates.
        pool: number of each request's nodes on the superset, and those as probable as the last.

    Returns:
        Request and place of the nodes on the superset; the candidates that are not on it; ids of
        all these, and their parents' ids.

    """
    num_requests, size = paths.shape[0], paths.shape[1] - 1
    most = num_requests * size
    rows, columns = np.empty(most, np.int64), np.empty(most, np.int64)
    floor = np.full(num_requests, -1.0)
    new = np.empty(len(hosts), np.int64)
    ids, above_ids = np.empty(most + len(hosts), np.int64), np.empty(most + len(hosts), np.int64)
    count = num_new = 0
    for row in range(num_requests):
        if pool < size:
            floor[row] = _largest(paths[row, :size], pool)
        for place in range(size):
            if paths[row, place] < floor[row]:
                continue
            rows[count], columns[count] = row, place
            ids[count] = row * size + place
            above = parents[place]
            above_ids[count] = -1 if above == size else row * size + above
            count += 1
    num_on_superset = count
    for node in range(len(hosts)):
        row, above = request[node], other_parents[node]
        if hosts[node] >= 0 or other_paths[node] <= floor[row]:
            continue
        ids[count] = num_requests * size + node
        if above < 0:
            above_ids[count] = -1
        elif hosts[above] >= 0:
            above_ids[count] = row * size + hosts[above]
        else:
            above_ids[count] = num_requests * size + above
        new[num_new] = node
        count, num_new = count + 1, num_new + 1
    on_superset = slice(0, num_on_superset)
    return rows[on_superset], columns[on_superset], new[:num_new], ids[:count], above_ids[:count]


def _without_heads(others: Candidates) -> Nodes:
    return Nodes(
        ids=np.arange(len(others.tokens)),
        parents=others.parents,
        request=others.request,
        tokens=others.tokens,
        depths=others.depths,
        probability=along_paths(others.parents, others.probability),
        source=others.source,
        num_ids=len(others.tokens),
    )
