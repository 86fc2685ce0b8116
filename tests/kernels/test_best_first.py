"""Best-first trees against their oracle, and by what defines them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.cases import DEVICE
from tests.oracles import best_first as oracle
from vllm_medusa.kernels.best_first import RankPaths, best_first

NUM_HEADS, NUM_GUESSES = 4, 5
seeds = st.integers(0, 2**32 - 1)


def random_paths(rng: random.Random, count: int) -> list[oracle.RankPath]:
    paths: list[oracle.RankPath] = []
    for _ in range(count):
        path = (*rng.choice([(), *paths]), rng.randrange(NUM_GUESSES))
        if len(path) <= NUM_HEADS and path not in paths:
            paths.append(path)
    return sorted(paths, key=lambda path: (len(path), path))


def random_guesses(rng: random.Random, num_reqs: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """[K, B, k] log-probabilities, with many ties if the kind says so, and tokens."""
    values = {
        "any": lambda: rng.uniform(-9, 0),
        "ties": lambda: rng.choice([0.0, 0.0, -1.0, -2.0, -float("inf")]),
        "tiny": lambda: -rng.choice([0.0, 1e-9, 1e-8, 30.0]),
        "rounded up": lambda: rng.choice([1e-7, 0.0, -1.0]),
    }[kind]
    shape = NUM_HEADS, num_reqs, NUM_GUESSES
    log_probs = np.array([values() for _ in range(np.prod(shape))], dtype=np.float32)
    tokens = np.array([rng.randrange(100) for _ in range(np.prod(shape))])
    return log_probs.reshape(shape), tokens.reshape(shape)


@given(
    seeds,
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 4),
    st.sampled_from(["any", "ties", "tiny", "rounded up"]),
)
def test_the_oracles_tree(
    seed: int, num_paths: int, num_nodes: int, num_reqs: int, kind: str
) -> None:
    rng = random.Random(seed)
    paths = random_paths(rng, num_paths)
    log_probs, guesses = random_guesses(rng, num_reqs, kind)
    parents, tokens = best_first(
        torch.from_numpy(log_probs).to(DEVICE),
        torch.from_numpy(guesses).to(DEVICE),
        RankPaths.build(paths, DEVICE),
        num_nodes,
    )
    for req in range(num_reqs):
        chosen = oracle.grow(paths, log_probs[:, req], num_nodes)
        wanted = oracle.as_nodes([path for path, _ in chosen], guesses[:, req], num_nodes)
        assert (parents[req].tolist(), tokens[req].tolist()) == wanted


@given(seeds, st.integers(1, 40), st.integers(1, 20), st.sampled_from(["any", "ties", "tiny"]))
def test_the_likeliest_nodes_are_a_tree(
    seed: int, num_paths: int, num_nodes: int, kind: str
) -> None:
    """No tree of so many nodes is likelier, every parent stands before its children."""
    rng = random.Random(seed)
    paths = random_paths(rng, num_paths)
    log_probs, _ = random_guesses(rng, 1, kind)
    # Each guess is its own name, so that the nodes' paths can be read off their tokens.
    names = torch.arange(log_probs.size).view(log_probs.shape).to(DEVICE)
    table = RankPaths.build(paths, DEVICE)
    parents, tokens = best_first(torch.from_numpy(log_probs).to(DEVICE), names, table, num_nodes)
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
        return float(sum(log_probs[d, 0, rank] for d, rank in enumerate(path)))

    scores = [score(path) for path in found[1:]]
    best = sorted((score(path) for path in paths), reverse=True)[:size]
    assert scores == pytest.approx(best, abs=1e-4)


def test_all_256_paths() -> None:
    rng = random.Random(1)
    paths = random_paths(rng, 700)[:256]
    log_probs, guesses = random_guesses(rng, 2, "any")
    table = RankPaths.build(paths, DEVICE)
    tensors = torch.from_numpy(log_probs).to(DEVICE), torch.from_numpy(guesses).to(DEVICE)
    parents, tokens = best_first(*tensors, table, 63)
    for req in range(2):
        chosen = [path for path, _ in oracle.grow(paths, log_probs[:, req], 63)]
        assert oracle.as_nodes(chosen, guesses[:, req], 63) == (
            parents[req].tolist(),
            tokens[req].tolist(),
        )


def test_a_guess_that_is_no_number_breaks_no_tree() -> None:
    log_probs = torch.full((NUM_HEADS, 1, NUM_GUESSES), float("nan"), device=DEVICE)
    paths = random_paths(random.Random(2), 40)
    guesses = torch.ones_like(log_probs, dtype=torch.int64)
    parents, _ = best_first(log_probs, guesses, RankPaths.build(paths, DEVICE), 8)
    assert all(0 <= parents[0, node] < node for node in range(1, 9))
