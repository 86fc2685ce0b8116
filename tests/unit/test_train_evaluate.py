"""Ranks of held-out tokens against a slow count, and what is made of them."""

from __future__ import annotations

import pytest
import torch

from tests.training import document, make_settings, make_target, random_documents
from vllm_medusa.acceptance.paths import RANK_CAP, best_paths
from vllm_medusa.data.documents import Document
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.evaluate import (
    answers_of,
    expected_acceptance,
    measure,
    rank_of,
    summary,
)
from vllm_medusa.training.model import TrainableHeads


@pytest.fixture
def target() -> FrozenTarget:
    return make_target()


@pytest.fixture
def heads(target: FrozenTarget) -> TrainableHeads:
    heads = TrainableHeads(make_settings(), target.weight)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        heads.blocks.weight += torch.randn(heads.blocks.weight.shape, generator=generator) * 0.2
    return heads


@torch.no_grad()
def slow_ranks(
    heads: TrainableHeads, target: FrozenTarget, item: Document
) -> list[list[list[int]]]:
    """Answer by answer, root by root, head by head: sort the logits, look for the token."""
    tokens = torch.from_numpy(item.tokens).long()
    hidden = target.hidden(tokens[None], torch.arange(len(tokens))[None])[0]
    result = []
    for start, stop in answers_of(item):
        table = []
        for root in range(start, stop):
            row = []
            for k in range(heads.num_heads):
                guessed = root + 1 + k
                if guessed >= stop:
                    row.append(RANK_CAP)
                    continue
                logits = heads.logits(heads.features(hidden[root - 1][None])[k], k)[0]
                order = logits.argsort(descending=True).tolist()
                row.append(min(RANK_CAP, order.index(int(tokens[guessed]))))
            table.append(row)
        result.append(table)
    return result


def test_ranks_are_those_of_a_slow_count(heads: TrainableHeads, target: FrozenTarget) -> None:
    documents = random_documents(7, seed=5)
    found = measure(heads, target, documents, batch_tokens=64)
    expected = [table for item in documents for table in slow_ranks(heads, target, item)]
    assert [item.ranks.tolist() for item in found] == expected
    assert len({rank for table in expected for row in table for rank in row}) > 20


def test_new_heads_guess_the_next_token_of_the_target(target: FrozenTarget) -> None:
    """A zero residual: the heads say what the lm_head says (of the position before the root)."""
    heads = TrainableHeads(make_settings(num_heads=2, num_layers=3), target.weight)
    hidden = torch.randn(5, 32)
    for k in range(2):
        torch.testing.assert_close(
            heads.logits(heads.features(hidden)[k], k), target.logits(hidden)
        )


@pytest.mark.parametrize("kind", [{"lm_head": "own"}, {"lm_head": "low-rank", "rank": 32}])
def test_new_lm_heads_are_copies_of_the_targets(
    target: FrozenTarget, kind: dict[str, object]
) -> None:
    heads = TrainableHeads(make_settings(**kind), target.weight)
    hidden = torch.randn(5, 32)
    for k in range(3):
        logits = heads.logits(heads.features(hidden)[k], k)
        torch.testing.assert_close(logits, target.logits(hidden), atol=1e-4, rtol=1e-4)
    before = target.weight.clone()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 1
    assert torch.equal(target.weight, before)


def test_loop_is_cut_before_the_guesses_that_reach_into_it(
    heads: TrainableHeads, target: FrozenTarget
) -> None:
    text = list(range(20)) * 2  # the second round of 20 repeats the first from token 20 on
    item = document([49, 48, *text], [0, 0, *[1] * 40])
    (found,) = measure(heads, target, [item], 64)
    assert len(found.ranks) == 40
    assert found.num_before_loop == 20 - heads.num_heads
    plain = document([49, 48, *range(20)], [0, 0, *[1] * 20])
    (found,) = measure(heads, target, [plain], 64)
    assert found.num_before_loop == 20


def test_rank_counts_strictly_larger_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0]])
    assert rank_of(logits, torch.tensor([2, 3])).tolist() == [2, 0]
    assert rank_of(torch.arange(100.0)[None], torch.tensor([0])).tolist() == [RANK_CAP]


def test_summary_has_both_kinds_of_text_and_no_tree_larger_than_known(
    heads: TrainableHeads, target: FrozenTarget
) -> None:
    found = measure(heads, target, random_documents(12, seed=6), 128)
    ranks = [item.ranks for item in found]
    paths = best_paths(ranks, 64)
    figures = summary(found, paths[:20])
    assert figures.keys() == {"with_loops", "without_loops"}
    assert list(figures["with_loops"]["acceptance_length"]) == [
        "chain of 3",
        "tree of 8",
        "tree of 16",
    ]
    first = [row[0] for table in ranks for row in table.tolist()]
    share = sum(rank < 5 for rank in first) / len(first)
    assert figures["with_loops"]["accuracy"]["top-5"][0] == pytest.approx(share, abs=1e-4)
    hits = sum((table[:, 0] < RANK_CAP).sum() for table in ranks) / len(first)
    assert 1 < expected_acceptance(found) <= 1 + 3 * hits
