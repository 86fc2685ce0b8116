"""Best-first trees against their oracle, and by what defines them."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.cases import DEVICE, cases
from tests.oracles import best_first as oracle
from vllm_medusa.kernels.best_first import RankPaths, best_first

TableKind = Callable[[list[oracle.RankPath]], oracle.Tables]
NUM_HEADS, NUM_GUESSES = 4, 5
seeds = st.integers(0, 2**32 - 1)
table_kinds = st.sampled_from([oracle.by_head, oracle.by_parent])


def random_paths(rng: random.Random, count: int) -> list[oracle.RankPath]:
    paths: list[oracle.RankPath] = []
    for _ in range(count):
        path = (*rng.choice([(), *paths]), rng.randrange(NUM_GUESSES))
        if len(path) <= NUM_HEADS and path not in paths:
            paths.append(path)
    return sorted(paths, key=lambda path: (len(path), path))


def random_guesses(
    rng: random.Random, paths: oracle.Tables, num_reqs: int, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """[T, B, k] log-probabilities, with many ties if the kind says so, and tokens."""
    values = {
        "any": lambda: rng.uniform(-9, 0),
        "ties": lambda: rng.choice([0.0, 0.0, -1.0, -2.0, -float("inf")]),
        "tiny": lambda: -rng.choice([0.0, 1e-9, 1e-8, 30.0]),
        "rounded up": lambda: rng.choice([1e-7, 0.0, -1.0]),
    }[kind]
    shape = 1 + max(paths.values()), num_reqs, NUM_GUESSES
    log_probs = np.array([values() for _ in range(np.prod(shape))], dtype=np.float32)
    tokens = np.array([rng.randrange(100) for _ in range(np.prod(shape))])
    return log_probs.reshape(shape), tokens.reshape(shape)


def rank_paths(paths: oracle.Tables) -> RankPaths:
    return RankPaths.build(list(paths), list(paths.values()), DEVICE)


def check_trees(
    paths: oracle.Tables, log_probs: np.ndarray, guesses: np.ndarray, num_nodes: int
) -> None:
    """Every request's tree is the oracle's."""
    tensors = torch.from_numpy(log_probs).to(DEVICE), torch.from_numpy(guesses).to(DEVICE)
    parents, tokens = best_first(*tensors, rank_paths(paths), num_nodes)
    for req in range(log_probs.shape[1]):
        chosen = [path for path, _ in oracle.grow(paths, log_probs[:, req], num_nodes)]
        wanted = oracle.as_nodes(chosen, paths, guesses[:, req], num_nodes)
        assert (parents[req].tolist(), tokens[req].tolist()) == wanted


@cases()
@given(
    seeds,
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 4),
    st.sampled_from(["any", "ties", "tiny", "rounded up"]),
    table_kinds,
)
def test_the_oracles_tree(
    seed: int, num_paths: int, num_nodes: int, num_reqs: int, kind: str, tables: TableKind
) -> None:
    rng = random.Random(seed)
    paths = tables(random_paths(rng, num_paths))
    check_trees(paths, *random_guesses(rng, paths, num_reqs, kind), num_nodes)


@cases()
@given(
    seeds,
    st.integers(1, 40),
    st.integers(1, 20),
    st.sampled_from(["any", "ties", "tiny"]),
    table_kinds,
)
def test_the_likeliest_nodes_are_a_tree(
    seed: int, num_paths: int, num_nodes: int, kind: str, tables: TableKind
) -> None:
    """No tree of so many nodes is likelier, every parent stands before its children."""
    rng = random.Random(seed)
    paths = tables(random_paths(rng, num_paths))
    log_probs, _ = random_guesses(rng, paths, 1, kind)
    # Each guess is its own name, so that the nodes' paths can be read off their tokens.
    names = torch.arange(log_probs.size).view(log_probs.shape).to(DEVICE)
    values = torch.from_numpy(log_probs).to(DEVICE)
    parents, tokens = best_first(values, names, rank_paths(paths), num_nodes)
    size = min(num_nodes, len(paths))
    found: list[oracle.RankPath] = [()]
    for node in range(1, size + 1):
        assert 0 <= parents[0, node] < node
        rank = int(tokens[0, node - 1]) % NUM_GUESSES
        found.append((*found[int(parents[0, node])], rank))
    assert len(set(found)) == size + 1
    assert set(found) <= {(), *paths}
    assert (parents[0, size + 1 :] == -1).all()

    def score(path: oracle.RankPath) -> float:
        steps = [path[: depth + 1] for depth in range(len(path))]
        return float(sum(log_probs[paths[step], 0, step[-1]] for step in steps))

    scores = [score(path) for path in found[1:]]
    best = sorted((score(path) for path in paths), reverse=True)[:size]
    assert scores == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("tables", [oracle.by_head, oracle.by_parent])
def test_all_256_paths(tables: TableKind) -> None:
    rng = random.Random(1)
    paths = tables(random_paths(rng, 700)[:256])
    check_trees(paths, *random_guesses(rng, paths, 2, "any"), 63)


def test_a_path_reads_the_table_of_its_own_parent() -> None:
    """What is likely below the second guess is not what is likely below the first."""
    paths = oracle.by_parent([(0,), (1,), (0, 0), (1, 0)])
    log_probs = np.log(np.array([[0.5, 0.4], [0.2, 0.1], [0.9, 0.1]], dtype=np.float32))
    guesses = torch.tensor([[10, 11], [20, 21], [30, 31]], device=DEVICE)
    values = torch.from_numpy(log_probs).to(DEVICE)
    parents, tokens = best_first(values[:, None], guesses[:, None], rank_paths(paths), 3)
    assert tokens.tolist() == [[10, 11, 30]]
    assert parents.tolist() == [[0, 0, 0, 2]]


def test_a_guess_that_is_no_number_breaks_no_tree() -> None:
    log_probs = torch.full((NUM_HEADS, 1, NUM_GUESSES), float("nan"), device=DEVICE)
    paths = oracle.by_head(random_paths(random.Random(2), 40))
    guesses = torch.ones_like(log_probs, dtype=torch.int64)
    parents, _ = best_first(log_probs, guesses, rank_paths(paths), 8)
    assert all(0 <= parents[0, node] < node for node in range(1, 9))
