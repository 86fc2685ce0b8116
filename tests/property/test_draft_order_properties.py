"""Depth-first order of drafts against a walk of each tree."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_medusa.draft.order import depth_first
from vllm_medusa.draft.types import Drafts
from vllm_medusa.tree.step_trees import path_starts


def random_drafts(rng: random.Random) -> Drafts:
    """Trees of up to five requests, some of no nodes; each node's token is its own."""
    parents: list[int] = []
    depths: list[int] = []
    starts = [0]
    for _ in range(rng.randint(1, 5)):
        mine = [0]
        for node in range(1, rng.choice([1, rng.randint(1, 20)])):
            parent = rng.randrange(node)
            parents.append(parent)
            mine.append(mine[parent] + 1)
        depths += mine[1:]
        starts.append(len(parents))
    count = len(parents)
    return Drafts(
        tokens=np.arange(count),
        parents=np.array(parents, dtype=np.int64),
        depths=np.array(depths, dtype=np.int64),
        probability=np.linspace(1, 0, count),
        source=np.arange(count) % 4,
        starts=np.array(starts),
    )


def walk(parents: list[int], node: int = 0) -> list[int]:
    """The nodes below a node, children in their order."""
    below = []
    for child, parent in enumerate(parents, start=1):
        if parent == node:
            below += [child, *walk(parents, child)]
    return below


@given(seed=st.integers(0, 100_000))
def test_order_is_that_of_a_walk(seed: int) -> None:
    drafts = random_drafts(random.Random(seed))
    ordered = depth_first(drafts)
    assert ordered.starts.tolist() == drafts.starts.tolist()
    for before, after in zip(drafts, ordered, strict=True):
        nodes = walk(before.parents.tolist())
        assert after.tokens.tolist() == [before.tokens[node - 1] for node in nodes]
        for name in ("depths", "probability", "source"):
            values = getattr(before, name)
            assert getattr(after, name).tolist() == [values[node - 1] for node in nodes]
        where = {0: 0} | {node: place for place, node in enumerate(nodes, start=1)}
        assert after.parents.tolist() == [where[before.parents[node - 1]] for node in nodes]
        leaves = set(range(1, len(nodes) + 1)) - set(after.parents.tolist())
        assert len(path_starts(after.parents.tolist())) == max(1, len(leaves))
