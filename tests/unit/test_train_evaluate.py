"""What new heads guess, and the figures of held-out rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.training import document, make_settings, make_target, random_documents
from vllm_medusa.acceptance.ranks import Continuation, RankMeter
from vllm_medusa.acceptance.statistics import RANK_CAP
from vllm_medusa.acceptance.trees import best_paths
from vllm_medusa.errors import UserError
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.evaluate import expected_acceptance, measurable_texts, summary
from vllm_medusa.training.model import TrainableHeads


@pytest.fixture
def target() -> FrozenTarget:
    return make_target()


@pytest.fixture
def heads(target: FrozenTarget) -> TrainableHeads:
    heads = TrainableHeads(make_settings(), target)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        heads.blocks.weight += torch.randn(heads.blocks.weight.shape, generator=generator) * 0.2
    return heads


FOLLOWING = torch.arange(15).view(5, 3)


@pytest.mark.parametrize("hydra", [False, True])
def test_new_heads_guess_the_next_token_of_the_target(target: FrozenTarget, hydra: bool) -> None:
    """A zero residual: the heads say what the lm_head says (of the position before the root)."""
    heads = TrainableHeads(make_settings(num_heads=2, num_layers=3, hydra=hydra), target)
    hidden = torch.randn(5, 32)
    for k in range(2):
        torch.testing.assert_close(
            heads.logits(heads.features(hidden, FOLLOWING)[k], k), target.logits(hidden)
        )


@pytest.mark.parametrize("kind", [{"lm_head": "own"}, {"lm_head": "low-rank", "rank": 32}])
def test_new_lm_heads_are_copies_of_the_targets(
    target: FrozenTarget, kind: dict[str, object]
) -> None:
    heads = TrainableHeads(make_settings(**kind), target)
    hidden = torch.randn(5, 32)
    for k in range(3):
        logits = heads.logits(heads.features(hidden, FOLLOWING)[k], k)
        torch.testing.assert_close(logits, target.logits(hidden), atol=1e-4, rtol=1e-4)
    before = target.weight.clone()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter += 1
    assert torch.equal(target.weight, before)


def test_summary_has_both_kinds_of_text_and_no_tree_larger_than_known(
    heads: TrainableHeads, target: FrozenTarget
) -> None:
    rows = random_documents(12, seed=6)
    given = measurable_texts(rows, {7}, heads.num_heads, temperature=0.5, setting="--data d")
    found = RankMeter(target, heads, 128).measure(given, lambda _: None)
    ranks = [item.ranks for item in found]
    paths = best_paths(ranks, 64)
    figures = summary(found, paths[:20])
    assert figures.keys() == {"with_loops", "without_loops"}
    assert list(figures["with_loops"]["acceptance_length"]) == [
        "chain of 3",
        "tree of 4",
        "tree of 8",
        "tree of 16",
    ]
    first = [row[0] for table in ranks for row in table.tolist()]
    share = sum(rank < 5 for rank in first) / len(first)
    assert figures["with_loops"]["accuracy"]["top-5"][0] == pytest.approx(share, abs=1e-4)
    hits = sum((table[:, 0] < RANK_CAP).sum() for table in ranks) / len(first)
    assert 1 < expected_acceptance(found) <= 1 + 3 * hits


def test_rows_on_which_nothing_can_be_measured_are_refused() -> None:
    short = [document([1, 2, 3, 4, 5], [0, 1, 1, 1, 1]), document([1, 7], [0, 1])]
    told = {"temperature": 0.5, "setting": "--data d"}
    assert [text.temperature for text in measurable_texts(short, {5}, 3, **told)] == [0.5, 0.5]
    with pytest.raises(UserError, match=r"--data d: none of its 2 answers.*takes 5 tokens"):
        measurable_texts(short, {7}, 3, **told)


def test_spread_is_that_of_prompts() -> None:
    """Of answers, all of one prompt, there is no telling; of unlike prompts it is wide."""
    accepted = np.zeros((30, 3), dtype=np.int16)
    missed = np.full((30, 3), RANK_CAP, dtype=np.int16)
    tables = [accepted, missed] * 10
    found = {}
    for kind, names in (("one", ["p"] * 20), ("unlike", [f"p{i}" for i in range(20)])):
        items = [Continuation(n, 0.0, table, 30) for n, table in zip(names, tables, strict=True)]
        figures = summary(items, [(0,)])["with_loops"]
        assert figures["interval"].keys() == figures["acceptance_length"].keys() == {"chain of 3"}
        found[kind] = figures["interval"]["chain of 3"]
        # 8 steps of 4 tokens, and 30 of 1.
        assert figures["acceptance_length"]["chain of 3"] == round(62 / 38, 4)
    assert found["one"] == [round(62 / 38, 4)] * 2
    low, high = found["unlike"]
    assert 1.2 < low < 1.5
    assert 1.8 < high < 2.4
