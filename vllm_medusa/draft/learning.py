"""How often candidates are right: logistic curves that learn.

A candidate is right, given that its parent is, with probability ``sigmoid(features . slopes +
bias[group])``. While serving, every 100 steps the slopes and biases take one Newton step towards
what was seen in them. This is what vLLM's ``OnlineAcceptanceEstimator`` does
(``v1/worker/gpu/spec_decode/acceptance_estimator.py``), with another damping. There a step is
damped by its own number of observations; here by the weight of the earlier ones, so that a few new
observations do not change a curve much that many older ones have determined.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from vllm_medusa.draft.compiled import compiled
from vllm_medusa.draft.types import Bools, Floats, Ints
from vllm_medusa.errors import UserError

#: No probability is closer to 0 or 1: a path's falls from node to node.
MIN_PROBABILITY = 1e-6
MAX_PROBABILITY = 0.9995
#: Log-odds are cut off there.
_MAX_LOG_ODDS = 14.0
#: Steps between two updates.
STEPS_PER_UPDATE = 100
#: Share of the information that stays at each update: about the last twenty updates count.
_MEMORY = 0.95
#: Weight of a curve that was never fitted, in observations for each of its biases.
_PRIOR_OBSERVATIONS = 50.0
#: The same of a curve that is fitted once, and the Newton steps that it takes.
_FIT_PRIOR = 4.0
_FIT_STEPS = 20
#: No coefficient moves further in one update.
_MAX_MOVE = 1.0


class LogisticCurve:
    """The probability that a candidate is right, given that its parent is.

    Args:
        slopes: [F], of the features.
        bias: [G], of the groups of candidates.

    Raises:
        UserError: if a number is not finite.

    """

    def __init__(self, slopes: Floats, bias: Floats) -> None:
        self.slopes = np.array(slopes, dtype=np.float64)
        self.bias = np.array(bias, dtype=np.float64)
        if not (np.isfinite(self.slopes).all() and np.isfinite(self.bias).all()):
            raise UserError(
                "the curve of a source of drafts has a number that is not finite; calibrate again"
            )

    def predict(self, features: Floats, groups: Ints) -> Floats:
        """Return the probabilities [...] of candidates.

        Args:
            features: [..., F].
            groups: of the same shape without F; or of its last dimensions only, for all others the
                same.

        """
        rows = features.reshape(-1, features.shape[-1])
        probability = predict(rows, groups.ravel(), self.slopes, self.bias)
        return probability.reshape(features.shape[:-1])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `from_dict` is the inverse."""
        return {"slopes": self.slopes.tolist(), "bias": self.bias.tolist()}

    @classmethod
    def from_dict(cls, values: Any, name: str, num_slopes: int, num_groups: int) -> LogisticCurve:
        """Read what `to_dict` made.

        Args:
            values: JSON values.
            name: name for messages.
            num_slopes, num_groups: required numbers of slopes and groups.

        Raises:
            UserError: it does not have this form, or is a curve of other features or groups.

        """
        try:
            curve = cls(
                np.array(values["slopes"], dtype=np.float64),
                np.array(values["bias"], dtype=np.float64),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the curve {name!r} is damaged ({error!r}); calibrate again") from None
        if curve.slopes.shape != (num_slopes,) or curve.bias.shape != (num_groups,):
            raise UserError(
                f"the curve {name!r} has {curve.slopes.size} slopes and {curve.bias.size} biases "
                f"instead of {num_slopes} and {num_groups}; calibrate again"
            )
        return curve


class Observer(Protocol):
    """Receives the candidates whose parent was right."""

    def observe(self, features: Floats, groups: Ints, predicted: Floats, right: Bools) -> None:
        """Receive n candidates.

        Args:
            features, groups: [n, F] and [n].
            predicted: [n] predictions of the current curve.
            right: [n] whether the candidate was right.

        """

    def end_step(self) -> None:
        """Count a step."""


class Recorder:
    """Keeps all candidates that it receives, to fit a curve or to compare with predictions."""

    def __init__(self) -> None:
        self._parts: list[tuple[Floats, Ints, Floats, Bools]] = []

    def observe(self, features: Floats, groups: Ints, predicted: Floats, right: Bools) -> None:
        """Keep n candidates."""
        self._parts.append((features, groups, predicted, right))

    def end_step(self) -> None:
        """Do nothing: steps do not matter here."""

    def __len__(self) -> int:
        return sum(len(right) for *_, right in self._parts)

    def observations(self) -> tuple[Floats, Ints, Floats, Bools]:
        """Return features, groups, predictions and outcomes of all candidates.

        Raises:
            ValueError: there are none.

        """
        features, groups, predicted, right = zip(*self._parts, strict=True)
        return (
            np.concatenate(features),
            np.concatenate(groups),
            np.concatenate(predicted),
            np.concatenate(right),
        )


class Learner:
    """Moves a curve towards what is observed, by Newton steps on the log-likelihood.

    Between updates the curve is constant, so the sums of an update belong to one curve. The memory
    is the square of the number of coefficients. The same observations in the same order give the
    same curve.

    Args:
        curve: changed in place.
        prior: weight of the given curve, in observations for each of its coefficients.

    """

    def __init__(self, curve: LogisticCurve, prior: float = _PRIOR_OBSERVATIONS) -> None:
        self.curve = curve
        self._num_slopes = len(curve.slopes)
        size = self._num_slopes + len(curve.bias)
        # p (1 - p) of an observation is 1/4 at most. A slope's features are of size one or so.
        self._prior = np.eye(size) * prior / 4
        self._information = self._prior.copy()
        self._seen = np.zeros((size, size))
        self._gradient = np.zeros(size)
        self._num_steps = 0

    def observe(self, features: Floats, groups: Ints, predicted: Floats, right: Bools) -> None:
        """Add n candidates to the sums."""
        _add(self._seen, self._gradient, features, groups, predicted, right)

    def end_step(self) -> None:
        """Count a step; every `STEPS_PER_UPDATE` the curve is updated."""
        self._num_steps += 1
        if self._num_steps % STEPS_PER_UPDATE == 0:
            self.update()

    def update(self) -> None:
        """Move the curve by one Newton step."""
        # The prior never fades, so that the matrix does not become singular without observations.
        self._information = _MEMORY * self._information + (1 - _MEMORY) * self._prior + self._seen
        move = np.clip(np.linalg.solve(self._information, self._gradient), -_MAX_MOVE, _MAX_MOVE)
        self.curve.slopes += move[: self._num_slopes]
        self.curve.bias += move[self._num_slopes :]
        self._seen[:] = 0
        self._gradient[:] = 0


def fit(curve: LogisticCurve, features: Floats, groups: Ints, right: Bools) -> None:
    """Fit a curve to n observations, by Newton steps from its present values.

    Args:
        curve: changed in place.
        features, groups, right: as in `Observer.observe`.

    """
    for _ in range(_FIT_STEPS):
        learner = Learner(curve, _FIT_PRIOR)
        learner.observe(features, groups, curve.predict(features, groups), right)
        learner.update()


@compiled
def predict(features: Floats, groups: Ints, slopes: Floats, bias: Floats) -> Floats:
    """Return a `LogisticCurve`'s probabilities [n] of candidates.

    Args:
        features: [n, F].
        groups: [n]; or fewer, which are then repeated.
        slopes, bias: of the curve.

    """
    probability = np.empty(len(features))
    for row in range(len(features)):
        total = bias[groups[row % len(groups)]]
        for column in range(len(slopes)):
            total += features[row, column] * slopes[column]
        probability[row] = sigmoid(total)
    return probability


@compiled
def sigmoid(total: float) -> float:
    """Return the probability with these log-odds, within its limits."""
    chance = 1 / (1 + np.exp(-min(max(total, -_MAX_LOG_ODDS), _MAX_LOG_ODDS)))
    return float(min(max(chance, MIN_PROBABILITY), MAX_PROBABILITY))


@compiled
def log_odds(probability: float) -> float:
    """Return the log-odds of a probability, which are finite."""
    inside = min(max(probability, MIN_PROBABILITY), 1 - MIN_PROBABILITY)
    return float(np.log(inside / (1 - inside)))


@compiled
def _add(
    seen: Floats, gradient: Floats, features: Floats, groups: Ints, predicted: Floats, right: Bools
) -> None:
    """Add n candidates to the sums of a `Learner`: information and gradient at the curve."""
    num_slopes = features.shape[1]
    for place in range(len(groups)):
        weight = predicted[place] * (1 - predicted[place])
        excess = right[place] - predicted[place]
        bias = num_slopes + groups[place]
        seen[bias, bias] += weight
        gradient[bias] += excess
        for row in range(num_slopes):
            weighted = weight * features[place, row]
            gradient[row] += excess * features[place, row]
            seen[row, bias] += weighted
            seen[bias, row] += weighted
            for column in range(num_slopes):
                seen[row, column] += weighted * features[place, column]
