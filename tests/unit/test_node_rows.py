"""Rows of a step's logits, against a count of them one by one."""

import random

import pytest
import torch

from tests.oracles.tree import random_subtree
from vllm_medusa.tree.rows import NodeRows
from vllm_medusa.tree.step_trees import StepTrees


@pytest.mark.parametrize("seed", range(30))
def test_rows_are_counted_out_request_by_request(seed: int) -> None:
    rng = random.Random(seed)
    trees = [
        random_subtree(rng.randrange, rng.randint(1, 20), 4, 3) for _ in range(rng.randint(1, 6))
    ]
    counts = tuple(rng.randint(0, tree.num_draft_tokens) for tree in trees)
    parents = [tree.parents[1 : n + 1] for tree, n in zip(trees, counts, strict=True)]
    rows = NodeRows.build(StepTrees.build(parents))
    assert rows.num_requests == len(counts)
    assert rows.num_drafts.tolist() == list(counts)
    num_rows = num_drafts = 0
    for req, count in enumerate(counts):
        assert rows.starts[req] == num_rows
        root = num_rows
        for node in range(max(counts) + 1):
            if node > count:
                assert rows.row[req, node] == root
                continue
            assert (rows.req[num_rows], rows.node[num_rows]) == (req, node)
            assert rows.depth[num_rows] == len(([(), *trees[req].paths])[node])
            assert rows.row[req, node] == num_rows
            num_rows += 1
            if node > 0:
                assert rows.draft[req, node - 1] == num_drafts
                num_drafts += 1
    assert rows.starts[-1] == num_rows == len(rows.req)
    assert ((rows.draft >= 0) & (rows.draft <= max(num_drafts - 1, 0))).all()


def test_rows_of_a_step_without_drafts() -> None:
    rows = NodeRows.build(StepTrees.build([(), (), ()]))
    assert rows.req.tolist() == [0, 1, 2]
    assert rows.node.tolist() == rows.depth.tolist() == [0, 0, 0]
    assert torch.equal(rows.row, torch.arange(3)[:, None])
    assert not rows.draft.numel()
