"""Curves of probabilities: fitting, learning while serving, and their file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_medusa.draft.learning import (
    MAX_PROBABILITY,
    STEPS_PER_UPDATE,
    Learner,
    LogisticCurve,
    Recorder,
    fit,
)
from vllm_medusa.draft.probability import (
    Probabilities,
    head_features,
    head_groups,
    read_probabilities,
)
from vllm_medusa.draft.types import Source
from vllm_medusa.errors import UserError

TRUE = LogisticCurve(np.array([0.7, -1.1]), np.array([-0.5, 0.2, 1.0]))


def draw(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, groups and outcomes of the true curve."""
    features = random.normal(size=(count, 2))
    groups = random.integers(0, 3, count)
    right = random.random(count) < TRUE.predict(features, groups)
    return features, groups, right


def serve(learner: Learner, random: np.random.Generator, num_steps: int, count: int = 40) -> None:
    for _ in range(num_steps):
        features, groups, right = draw(random, count)
        learner.observe(features, groups, learner.curve.predict(features, groups), right)
        learner.end_step()


def log_loss(curve: LogisticCurve, seed: int = 99) -> float:
    features, groups, right = draw(np.random.default_rng(seed), 20_000)
    p = curve.predict(features, groups)
    return float(-np.mean(np.where(right, np.log(p), np.log(1 - p))))


def naive_newton(curve: LogisticCurve, seen: list[Any], prior: float) -> np.ndarray:
    """One damped Newton step, observation by observation."""
    size = 2 + 3
    information, gradient = np.eye(size) * prior / 4, np.zeros(size)
    for features, groups, right in seen:
        for x, group, y in zip(features, groups, right, strict=True):
            row = np.concatenate([x, np.eye(3)[group]])
            p = float(curve.predict(x[None], np.array([group]))[0])
            information += p * (1 - p) * np.outer(row, row)
            gradient += (y - p) * row
    return np.linalg.solve(information, gradient)


def new_curve() -> LogisticCurve:
    return LogisticCurve(np.zeros(2), np.zeros(3))


def test_first_update_is_a_damped_newton_step() -> None:
    random = np.random.default_rng(0)
    curve, seen = new_curve(), [draw(random, 30) for _ in range(STEPS_PER_UPDATE)]
    learner = Learner(curve, prior=50)
    expected = naive_newton(new_curve(), seen, prior=50)
    for features, groups, right in seen:
        assert not curve.slopes.any()
        learner.observe(features, groups, curve.predict(features, groups), right)
        learner.end_step()
    np.testing.assert_allclose([*curve.slopes, *curve.bias], expected, rtol=1e-9)


def test_learning_reaches_the_truth_and_stays() -> None:
    curve = new_curve()
    learner, random = Learner(curve), np.random.default_rng(1)
    before = log_loss(curve)
    serve(learner, random, 10 * STEPS_PER_UPDATE)
    after = log_loss(curve)
    assert after < before - 0.1
    assert after == pytest.approx(log_loss(TRUE), abs=0.002)
    serve(learner, random, 20 * STEPS_PER_UPDATE)
    assert log_loss(curve) == pytest.approx(log_loss(TRUE), abs=0.002)


def test_few_observations_move_little() -> None:
    curve = LogisticCurve(TRUE.slopes, TRUE.bias)
    learner = Learner(curve)
    learner.observe(np.zeros((2, 2)), np.array([0, 0]), np.full(2, 0.4), np.array([True, True]))
    learner.update()
    assert 0 < curve.bias[0] - TRUE.bias[0] < 0.1
    np.testing.assert_array_equal(curve.bias[1:], TRUE.bias[1:])


def test_learning_follows_a_change() -> None:
    curve = new_curve()
    learner, random = Learner(curve), np.random.default_rng(2)
    serve(learner, random, 50 * STEPS_PER_UPDATE)
    changed = LogisticCurve(TRUE.slopes, TRUE.bias - 2)
    for _ in range(100 * STEPS_PER_UPDATE):
        features, groups, _ = draw(random, 40)
        right = random.random(40) < changed.predict(features, groups)
        learner.observe(features, groups, curve.predict(features, groups), right)
        learner.end_step()
    np.testing.assert_allclose(curve.bias, changed.bias, atol=0.15)


def test_learning_is_deterministic() -> None:
    curves = [new_curve(), new_curve()]
    for curve in curves:
        serve(Learner(curve), np.random.default_rng(3), 3 * STEPS_PER_UPDATE)
    np.testing.assert_array_equal(curves[0].slopes, curves[1].slopes)
    np.testing.assert_array_equal(curves[0].bias, curves[1].bias)
    assert curves[0].slopes.any()


def test_learning_without_observations_changes_nothing() -> None:
    curve = LogisticCurve(TRUE.slopes, TRUE.bias)
    learner = Learner(curve)
    for _ in range(3 * STEPS_PER_UPDATE):
        learner.end_step()
    np.testing.assert_array_equal(curve.bias, TRUE.bias)


def test_fit_finds_the_curve() -> None:
    curve = new_curve()
    fit(curve, *draw(np.random.default_rng(4), 20_000))
    np.testing.assert_allclose(curve.slopes, TRUE.slopes, atol=0.07)
    np.testing.assert_allclose(curve.bias, TRUE.bias, atol=0.07)


def test_fit_of_what_is_always_right_is_finite() -> None:
    curve = new_curve()
    fit(curve, np.ones((50, 2)), np.zeros(50, dtype=np.int64), np.ones(50, dtype=bool))
    assert np.isfinite([*curve.slopes, *curve.bias]).all()
    assert curve.predict(np.ones((1, 2)), np.array([0])) > 0.95
    assert curve.predict(np.full((1, 2), 1e9), np.array([0])) == MAX_PROBABILITY


def test_recorder_keeps_all() -> None:
    recorder, random = Recorder(), np.random.default_rng(5)
    parts = [draw(random, count) for count in (3, 0, 5)]
    for features, groups, right in parts:
        recorder.observe(features, groups, np.full(len(right), 0.5), right)
        recorder.end_step()
    features, groups, predicted, right = recorder.observations()
    np.testing.assert_array_equal(features, np.concatenate([part[0] for part in parts]))
    np.testing.assert_array_equal(groups, np.concatenate([part[1] for part in parts]))
    np.testing.assert_array_equal(right, np.concatenate([part[2] for part in parts]))
    assert predicted.tolist() == [0.5] * 8


def test_file_of_probabilities(tmp_path: Path) -> None:
    probabilities = Probabilities.default(3, 7)
    probabilities.curves[Source.TEXT].bias[0] = -1.5
    path = tmp_path / "p.json"
    path.write_text(json.dumps(probabilities.to_dict()))
    read = read_probabilities(path, 3, 7)
    assert read.to_dict() == probabilities.to_dict()
    assert read.curves[Source.TEXT].bias[0] == -1.5


def test_source_without_a_curve_has_the_default() -> None:
    values = Probabilities.default(3, 7).to_dict()
    del values["curves"]["shared_text"]
    assert Probabilities.from_dict(values, 3, 7).to_dict() == Probabilities.default(3, 7).to_dict()


def damaged(*path: str, value: Any) -> str:
    values = Probabilities.default(2, 3).to_dict()
    inner = values
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        (damaged("format", value="other/1"), "format 'other/1' instead of"),
        (damaged("paths", value=None), "no curves or no list of paths"),
        (damaged("paths", value=[[0, 0]]), r"\[0, 0\] of the superset has no parent"),
        (damaged("paths", value=[["x"]]), r"\['x'\] of the superset must be a list of ranks"),
        (damaged("curves", "heads", value=None), "curve 'heads' is damaged"),
        (damaged("curves", "heads", "bias", value=[1.0]), "1 biases instead of 1 and 10"),
        (damaged("curves", "text", "slopes", value=["x"]), "curve 'text' is damaged"),
        (damaged("curves", "text", "bias", value=[float("nan")]), "not finite"),
    ],
)
def test_bad_file_of_probabilities(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_probabilities(path, 2, 3)
    assert str(path) in str(error.value)


def test_missing_file_of_probabilities(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_probabilities(tmp_path / "none.json", 2, 3)


def test_heads_features_and_groups() -> None:
    features = head_features(np.array([[0.5, 0.0, 1.0]]))
    assert features.shape == (1, 3, 1)
    assert features[0, 0, 0] == 0
    assert np.isfinite(features).all()
    assert head_groups(2, 8).tolist() == [[0, 1, 2, 3, 3, 3, 4, 4], [5, 6, 7, 8, 8, 8, 9, 9]]
