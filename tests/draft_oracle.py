"""Merging and choosing nodes, slowly and obviously; and random candidates to compare on.

A tree is a dict from a node's path, the tuple of its tokens from the root, to what is said of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from vllm_medusa.draft.learning import MAX_PROBABILITY, MIN_PROBABILITY, LogisticCurve
from vllm_medusa.draft.types import Candidates, Draft, Guesses, Source

Path = tuple[int, ...]
#: Of a node: its probability given its parent, and its sources.
Tree = dict[Path, tuple[float, int]]

NUM_TOKENS = 6


@dataclass
class Case:
    """What the sources propose to B requests."""

    rank_paths: list[Path]
    by_parent: bool  # whether each path with children has guesses of its own
    guesses: Guesses | None
    trees: list[list[Tree]]  # source by source, request by request

    @property
    def proposals(self) -> list[Candidates]:
        return [as_candidates(trees) for trees in self.trees]


def as_candidates(trees: Sequence[Tree]) -> Candidates:
    """The trees of all requests as one source's candidates."""
    depth = max((len(path) for tree in trees for path in tree), default=0)
    rows: list[tuple[int, int, int, float, int]] = []
    place: dict[tuple[int, Path], int] = {(b, ()): -1 for b in range(len(trees))}
    levels = [0]
    for d in range(1, depth + 1):
        for b, tree in enumerate(trees):
            for path, (probability, source) in tree.items():
                if len(path) == d:
                    place[b, path] = len(rows)
                    rows.append((b, place[b, path[:-1]], path[-1], probability, source))
        levels.append(len(rows))
    if not rows:
        return Candidates.none()
    request, parents, tokens, probability, source = map(np.array, zip(*rows, strict=True))
    return Candidates(request, parents, tokens, probability, source, np.array(levels))


def parents_of(rank_paths: Sequence[Path]) -> list[Path]:
    """The paths that have children, in the order of their tables of guesses."""
    return sorted({path[:-1] for path in rank_paths}, key=lambda path: (len(path), path))


def table_of(case: Case, parent: Path) -> int | None:
    """Which guesses are those below a rank path, if any."""
    if not case.by_parent:
        return len(parent)
    parents = parents_of(case.rank_paths)
    return parents.index(parent) if parent in parents else None


def tables_along(case: Case, request: int, text: Sequence[int]) -> list[int]:
    """Which guesses are those below each depth of a text, until there are none."""
    assert case.guesses is not None
    num_heads = 3 if case.by_parent else case.guesses.tokens.shape[1]
    tables: list[int] = []
    path: Path | None = ()
    for depth, token in enumerate(text[:num_heads]):
        # Medusa heads guess the same whatever came before.
        table = depth
        if case.by_parent:
            found = None if path is None else table_of(case, path)
            if found is None:
                break
            table = found
        tables.append(table)
        guesses = case.guesses.tokens[request, table].tolist()
        path = (*path, guesses.index(token)) if path is not None and token in guesses else None
    return tables


def heads_tree(case: Case, request: int) -> Tree:
    assert case.guesses is not None
    tree: Tree = {}
    for ranks in case.rank_paths:
        cells = [(request, table_of(case, ranks[:d]), r) for d, r in enumerate(ranks)]
        path = tuple(int(case.guesses.tokens[cell]) for cell in cells)
        tree[path] = (float(case.guesses.probability[cells[-1]]), int(Source.HEADS))
    return tree


def merged(trees: Sequence[Tree]) -> Tree:
    result: Tree = {}
    for tree in trees:
        for path, (probability, source) in tree.items():
            before = result.get(path, (0.0, 0))
            result[path] = (max(before[0], probability), before[1] | source)
    return result


def path_probability(tree: Tree, path: Path) -> float:
    product = 1.0
    for depth in range(1, len(path) + 1):
        product *= tree[path[:depth]][0]
    return product


@dataclass(frozen=True)
class Agreed:
    """A candidate where heads and text both propose tokens: group, log-odds, new probability."""

    group: int
    log_odds: tuple[float, float]
    probability: float


def agreed(heads: Tree, text: Tree, curve: LogisticCurve) -> dict[Path, Agreed]:
    """The candidates of one request whose probabilities are those of the agreement curve."""

    def best(tree: Tree, parent: Path) -> float:
        return max((p for path, (p, _) in tree.items() if path[:-1] == parent), default=0.0)

    result = {}
    for path in {**heads, **text}:
        parent = path[:-1]
        if not best(heads, parent) or not best(text, parent):
            continue
        group = 0 if path in heads and path in text else 1 if path in heads else 2
        by_heads = heads[path][0] if path in heads else best(heads, parent)
        by_text = text[path][0] if path in text else best(text, parent)
        log_odds = math.log(by_heads / (1 - by_heads)), math.log(by_text / (1 - by_text))
        slopes = curve.slopes[2 * group : 2 * group + 2]
        total = float(np.dot(slopes, log_odds)) + curve.bias[group]
        probability = min(max(1 / (1 + math.exp(-total)), MIN_PROBABILITY), MAX_PROBABILITY)
        result[path] = Agreed(group, log_odds, probability)
    return result


def merge_slowly(
    case: Case, num_requests: int, curve: LogisticCurve
) -> list[dict[Path, tuple[float, int]]]:
    """Of each request: path -> probability from the root on, and sources."""
    results = []
    for b in range(num_requests):
        heads = {} if case.guesses is None else heads_tree(case, b)
        text = merged([source[b] for source in case.trees])
        tree = merged([heads, text])
        for path, given in agreed(heads, text, curve).items():
            tree[path] = (given.probability, tree[path][1])
        results.append({path: (path_probability(tree, path), s) for path, (_, s) in tree.items()})
    return results


def agreed_along(
    case: Case, request: int, text: Sequence[int], curve: LogisticCurve
) -> list[tuple[Agreed, bool]]:
    """The candidates below the prefixes of a text, and whether each is right."""
    heads = heads_tree(case, request)
    others = merged([source[request] for source in case.trees])
    found = []
    for path, given in agreed(heads, others, curve).items():
        parent = path[:-1]
        known = others if given.group == 2 else heads
        if len(path) <= len(text) and parent == tuple(text[:-1][: len(parent)]):
            assert not parent or parent in known
            found.append((given, text[len(parent)] == path[-1]))
    return found


def paths_of(draft: Draft) -> list[Path]:
    """The path of each node; fails where a parent does not come before its child."""
    paths: list[Path] = [()]
    for token, parent in zip(draft.tokens.tolist(), draft.parents.tolist(), strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


def num_forks(paths: Sequence[Path]) -> int:
    """Leaves beyond the first of a tree."""
    inner = {path[:-1] for path in paths}
    return max(0, sum(path not in inner for path in paths) - 1)


def closed_sets(probability: Mapping[tuple[int, Path], float]) -> list[set[tuple[int, Path]]]:
    """All choices of nodes that hold the parents of their nodes."""
    names = list(probability)
    found = []
    for flags in itertools.product((False, True), repeat=len(names)):
        chosen = {name for name, flag in zip(names, flags, strict=True) if flag}
        if all(len(path) == 1 or (b, path[:-1]) in chosen for b, path in chosen):
            found.append(chosen)
    return found


# Unlike one another, so that the order of nodes is never a matter of rounding.
probabilities = st.integers(1, 997).map(lambda n: n / 1000)


@st.composite
def trees(draw: st.DrawFn, source: Source, max_nodes: int, max_depth: int) -> Tree:
    tree: Tree = {}
    for _ in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.sampled_from([(), *tree]))
        if len(parent) < max_depth:
            path = (*parent, draw(st.integers(0, NUM_TOKENS - 1)))
            tree.setdefault(path, (draw(probabilities), int(source)))
    return tree


@st.composite
def rank_paths(draw: st.DrawFn, num_heads: int, num_guesses: int) -> list[Path]:
    paths: list[Path] = []
    for _ in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from([(), *paths]))
        path = (*parent, draw(st.integers(0, num_guesses - 1)))
        if len(path) <= num_heads and path not in paths:
            paths.append(path)
    return paths


@st.composite
def cases(draw: st.DrawFn, num_requests: int, max_nodes: int = 10, max_depth: int = 5) -> Case:
    num_heads, num_guesses = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    paths, by_parent = draw(rank_paths(num_heads, num_guesses)), draw(st.booleans())
    num_tables = len(parents_of(paths)) if by_parent else num_heads
    guesses = None
    if draw(st.integers(0, 4)):
        tokens = [
            [draw(st.permutations(range(NUM_TOKENS)))[:num_guesses] for _ in range(num_tables)]
            for _ in range(num_requests)
        ]
        size = num_requests * num_tables * num_guesses
        given = draw(st.lists(probabilities, min_size=size, max_size=size))
        guesses = Guesses(
            np.array(tokens).reshape(num_requests, num_tables, num_guesses),
            np.array(given).reshape(num_requests, num_tables, num_guesses),
        )
    sources = draw(st.lists(st.sampled_from([Source.TEXT, Source.SHARED_TEXT]), max_size=3))
    others = [
        [draw(trees(source, max_nodes, max_depth)) for _ in range(num_requests)]
        for source in sources
    ]
    return Case(paths, by_parent, guesses, others)
