"""Rows of a step's logits, against a count of them one by one."""

import random

import pytest
import torch

from vllm_medusa.plugin.worker.v1.node_rows import NodeRowsCache
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.reference import random_subtree


@pytest.mark.parametrize("seed", range(30))
def test_rows_are_counted_out_request_by_request(seed: int) -> None:
    rng = random.Random(seed)
    tree = random_subtree(rng.randrange, rng.randint(1, 20), 4, 3)
    layout = TreeLayout.build(tree)
    counts = tuple(rng.randint(0, tree.num_draft_tokens) for _ in range(rng.randint(1, 6)))
    rows = NodeRowsCache(layout, "cpu").get(counts)
    assert rows.num_requests == len(counts)
    assert rows.num_draft_tokens.tolist() == list(counts)
    num_rows = num_drafts = 0
    for req, count in enumerate(counts):
        assert rows.starts[req] == num_rows
        root = num_rows
        for node in range(layout.num_nodes):
            if node > count:
                assert rows.row[req, node] == root
                continue
            assert (rows.req[num_rows], rows.node[num_rows]) == (req, node)
            assert rows.depth[num_rows] == len(([(), *tree.paths])[node])
            assert rows.row[req, node] == num_rows
            num_rows += 1
            if node > 0:
                assert rows.draft[req, node - 1] == num_drafts
                num_drafts += 1
    assert rows.starts[-1] == num_rows == len(rows.req)
    assert rows.draft.min() >= 0
    assert rows.draft.max() <= max(num_drafts - 1, 0)


def test_rows_of_a_step_without_drafts() -> None:
    layout = TreeLayout.build(random_subtree(random.Random(1).randrange, 5, 3, 2))
    rows = NodeRowsCache(layout, "cpu").get((0, 0, 0))
    assert rows.req.tolist() == [0, 1, 2]
    assert rows.node.tolist() == rows.depth.tolist() == [0, 0, 0]
    assert torch.equal(rows.row, torch.arange(3)[:, None].expand(-1, layout.num_nodes))
    assert not rows.draft.any()


def test_rows_of_a_recent_step_are_kept() -> None:
    cache = NodeRowsCache(
        TreeLayout.build(random_subtree(random.Random(1).randrange, 5, 3, 2)), "cpu"
    )
    assert cache.get((2, 0)) is cache.get((2, 0))
    assert cache.get((2, 0)) is not cache.get((0, 2))
