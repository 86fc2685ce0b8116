"""The trees of requests that cannot have one of their own, without an engine."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.test_best_first import random_paths
from tests.oracles import best_first as oracle
from vllm_medusa.config import MedusaConfig
from vllm_medusa.draft.superset import Superset
from vllm_medusa.plugin.worker.v2.shapes import BestFirst, FixedTrees, Shape
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.limits import DynamicTrees
from vllm_medusa.tree.named import default_paths

CPU = torch.device("cpu")
NUM_HEADS, NUM_GUESSES = 4, 10


def best_first_of(paths: list[oracle.RankPath], num_nodes: int) -> BestFirst:
    config = MedusaConfig(
        heads="",
        revision=None,
        tree=DraftTree.from_paths(default_paths(NUM_HEADS, 16)),
        tree_name="",
        dynamic=DynamicTrees(max_nodes=num_nodes),
    )
    return BestFirst(config, Superset.from_paths(paths, NUM_HEADS, NUM_GUESSES), CPU)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 20), st.booleans())
def test_the_fixed_tree_reads_the_tables_of_its_paths(
    seed: int, num_paths: int, num_nodes: int, by_parent: bool
) -> None:
    rng = random.Random(seed)
    paths = random_paths(rng, num_paths)
    tables = (oracle.by_parent if by_parent else oracle.by_head)(paths)
    grown = best_first_of(paths, num_nodes)
    grown.read_tables(by_parent=by_parent)
    # Each guess is its own name.
    guesses = torch.arange((1 + max(tables.values())) * 2 * NUM_GUESSES).view(-1, 2, NUM_GUESSES)
    fixed = FixedTrees(grown.fixed_tree, num_nodes, CPU)
    shapes = torch.tensor([Shape.TREE, Shape.CHAIN])
    parents, tokens = fixed.choose(shapes, grown.fixed_tokens(guesses))

    def name(path: oracle.RankPath, req: int) -> int:
        return int(guesses[tables[path], req, path[-1]])

    tree = grown.fixed_tree.paths
    assert len(tree) == min(num_nodes, len(paths))
    assert set(tree) <= set(paths)
    assert tokens[0, : len(tree)].tolist() == [name(path, 0) for path in tree]
    assert parents[0].tolist()[1:] == [
        *grown.fixed_tree.parents[1:],
        *[-1] * (num_nodes - len(tree)),
    ]
    chain = [path for path in tree if not any(path)]
    assert tokens[1, : len(chain)].tolist() == [name(path, 1) for path in chain]
    assert parents[1].tolist() == [0, *range(num_nodes)]


@pytest.mark.parametrize("num_nodes", [4, 16])
def test_the_fixed_tree_has_the_heads_own_paths_first(num_nodes: int) -> None:
    own = default_paths(NUM_HEADS, 16)
    others = [(9,), (8,), (0, 9), (0, 0, 5), (0, 0, 0, 7)]
    grown = best_first_of([*own, *others], num_nodes)
    assert set(grown.fixed_tree.paths) <= set(own)
    assert len(grown.fixed_tree.paths) == num_nodes
