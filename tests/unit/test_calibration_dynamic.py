"""Probabilities of dynamic trees: fitted on some prompts, judged on others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_medusa.acceptance.ranks import Continuation, Guessed
from vllm_medusa.acceptance.statistics import RANK_CAP
from vllm_medusa.acceptance.texts import counted_positions, loop_start
from vllm_medusa.calibration import dynamic
from vllm_medusa.calibration.dynamic import guessed_text, measure_dynamic, reliability
from vllm_medusa.calibration.estimates import NUM_FOLDS, deal
from vllm_medusa.heads.selector import Selector
from vllm_medusa.tree.draft_tree import DraftTree

NUM_HEADS, NUM_GUESSES, VOCAB = 3, 4, 50
TREE = DraftTree.from_paths([(0,), (1,), (2,), (3,), (0, 0), (0, 0, 0)])


def made_up(
    seed: int, num_prompts: int = 20, length: int = 60, has_ended: bool = False
) -> list[Continuation]:
    """Texts in which the first guess is right as often as the head says."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt in range(num_prompts):
        tokens = rng.integers(0, VOCAB, 10 + length)
        answer = tokens[10:].tolist()
        counted = counted_positions(answer, has_ended, NUM_HEADS)
        shape = (counted.total, NUM_HEADS, NUM_GUESSES)
        guesses = VOCAB + np.tile(np.arange(NUM_GUESSES, dtype=np.int32), (*shape[:2], 1))
        probability = np.sort(rng.dirichlet(np.ones(NUM_GUESSES), shape[:2]), axis=-1)[..., ::-1]
        ranks = np.full(shape[:2], RANK_CAP, dtype=np.int16)
        for place in range(counted.total):
            for head in range(min(NUM_HEADS, length - place - 2)):
                rank = rng.choice(NUM_GUESSES, p=probability[place, head])
                guesses[place, head, rank] = answer[place + 1 + head]
                ranks[place, head] = rank
        given = Guessed(tokens, 10, has_ended, guesses, probability.astype(np.float32))
        found.append(Continuation(f"p{prompt}", 0.0, ranks, counted.before_loop, given))
    return found


def folds_of(items: list[Continuation]) -> np.ndarray:
    return deal([item.prompt_id for item in items], 0)


def test_bins_are_those_of_counting_one_by_one() -> None:
    rng = np.random.default_rng(0)
    predicted = np.append(rng.random(500) ** 2, [0.0, 0.1, 0.9995])
    right = rng.random(len(predicted)) < predicted
    expected = []
    for tenth in range(10):
        inside = [i for i, p in enumerate(predicted) if int(10 * p) == tenth]
        if inside:
            mean = sum(predicted[i] for i in inside) / len(inside)
            expected.append((len(inside), mean, sum(right[i] for i in inside) / len(inside)))
    found = reliability(predicted, right)
    assert [part.count for part in found] == [count for count, _, _ in expected]
    np.testing.assert_allclose([part.predicted for part in found], [p for _, p, _ in expected])
    np.testing.assert_allclose([part.observed for part in found], [o for _, _, o in expected])


def test_reliable_heads_are_found_reliable() -> None:
    items = made_up(1, 40, 100)
    found = measure_dynamic(items, folds_of(items), TREE, lambda _: None)
    for part in found.reliability["heads"]:
        if part.count > 200:
            error = np.sqrt(part.predicted * (1 - part.predicted) / part.count)
            assert abs(part.observed - part.predicted) < 4 * error + 0.04
    lengths = [accepted.with_loops for accepted in found.accepted]
    assert 1.5 < lengths[0] <= lengths[1] <= lengths[2]


def test_each_fold_is_judged_by_curves_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    items = made_up(2, num_prompts=12, length=40)
    folds = folds_of(items)
    fitted_to: list[set[str]] = []
    scored: list[set[str]] = []
    real_fit, real_drafter = dynamic.fit_probabilities, dynamic.Drafter
    by_curves: dict[int, int] = {}

    def fit(given, tree, selector):  # type: ignore[no-untyped-def]
        probabilities = real_fit(given, tree, selector)
        by_curves[id(probabilities)] = len(fitted_to)
        fitted_to.append({item.prompt_id for item in given})
        kept.append(probabilities)
        return probabilities

    kept: list[object] = []
    names = {item.guessed.tokens.tobytes(): item.prompt_id for item in items if item.guessed}

    def replay(texts, drafter):  # type: ignore[no-untyped-def]
        if used and used[-1] in by_curves:
            prompts = {
                name
                for tokens, name in names.items()
                if any(tokens.startswith(text.tokens.tobytes()) for text in texts)
            }
            assert prompts
            assert not prompts & fitted_to[by_curves[used[-1]]]
            scored.append(prompts)
        return real_replay(texts, drafter)

    used: list[int] = []

    def drafter(settings, probabilities, *rest, **named):  # type: ignore[no-untyped-def]
        used.append(id(probabilities))
        return real_drafter(settings, probabilities, *rest, **named)

    real_replay = dynamic.replay
    monkeypatch.setattr(dynamic, "fit_probabilities", fit)
    monkeypatch.setattr(dynamic, "replay", replay)
    monkeypatch.setattr(dynamic, "Drafter", drafter)
    measure_dynamic(items, folds, TREE, lambda _: None)
    assert len(fitted_to) == NUM_FOLDS + 1
    assert set.union(*scored) == {item.prompt_id for item in items}
    assert len(scored) == NUM_FOLDS * 2 * len(dynamic.SIZES)


def test_selector_that_changes_nothing_changes_nothing() -> None:
    items = made_up(5, num_prompts=10, length=40)
    selector = Selector(torch.ones(VOCAB + NUM_GUESSES, 3), NUM_HEADS)
    without = measure_dynamic(items, folds_of(items), TREE, lambda _: None)
    found = measure_dynamic(items, folds_of(items), TREE, lambda _: None, selector)
    for one, other in zip(found.accepted, without.accepted, strict=True):
        assert one.with_loops == pytest.approx(other.with_loops, rel=0.02)


def test_selector_that_knows_the_next_token() -> None:
    """It finds the right one of guesses that the heads hold for equally likely."""
    rng = np.random.default_rng(6)
    following = rng.permutation(VOCAB)
    items = []
    for item in made_up(7, num_prompts=10, length=40):
        assert item.guessed is not None
        tokens = [int(rng.integers(VOCAB))]
        while len(tokens) < 50:
            # Not always, or the text itself would say what follows.
            others = rng.integers(VOCAB)
            tokens.append(int(following[tokens[-1]] if rng.random() < 0.8 else others))
        shape = item.guessed.guesses.shape[:2]
        guesses = np.stack(
            [[rng.permutation(VOCAB)[:16] for _ in range(shape[1])] for _ in range(shape[0])]
        ).astype(np.int32)
        for place, head in np.ndindex(*shape):
            right = int(following[tokens[min(10 + place + head, 49)]])
            if right not in guesses[place, head]:
                guesses[place, head, rng.integers(16)] = right
        given = replace(
            item.guessed,
            tokens=np.array(tokens),
            guesses=guesses,
            probability=np.full(guesses.shape, 0.05, dtype=np.float32),
        )
        items.append(replace(item, guessed=given))
    selector = Selector(8 * torch.eye(VOCAB)[following], NUM_HEADS)
    selector.child.data.copy_(torch.eye(VOCAB))
    lengths = [
        measure_dynamic(items, folds_of(items), TREE, lambda _: None, s).accepted[0].without_loops
        for s in (None, selector)
    ]
    assert lengths[0] < 1.6
    assert lengths[1] > 2.2


@pytest.mark.parametrize("has_ended", [True, False])
def test_steps_begin_where_the_deepest_tree_ends_before_the_cut(has_ended: bool) -> None:
    (item,) = made_up(3, num_prompts=1, length=40, has_ended=has_ended)
    text = guessed_text(item, TREE, with_loops=True)
    assert text.num_positions == (39 if has_ended else 40 - 12 - 1)
    assert len(text.tokens) == 49
    assert text.guessed_tokens.shape == (len(item.ranks), NUM_HEADS, NUM_GUESSES)


def test_without_loops_steps_end_before_the_loop() -> None:
    (item,) = made_up(4, num_prompts=1, length=90)
    assert item.guessed is not None
    item.guessed.tokens[50:] = np.resize(item.guessed.tokens[50:57], len(item.guessed.tokens) - 50)
    start = loop_start(item.guessed.tokens[10:].tolist())
    assert 40 < start < 60
    assert guessed_text(item, TREE, with_loops=False).num_positions == start - 13
