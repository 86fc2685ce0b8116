"""What the Medusa heads guess: per depth, whatever the path (arXiv 2401.10774, section 2.1)."""

from __future__ import annotations

import numpy as np

from vllm_medusa.draft.compiled import compiled
from vllm_medusa.draft.learning import LogisticCurve, Observer
from vllm_medusa.draft.probability import head_features, head_groups
from vllm_medusa.draft.types import Bools, Emitted, Floats, Guesses, Ints


class HeadsSource:
    """Turns the heads' guesses into probabilities.

    Args:
        curve: gives them, by a guess's own probability, depth and rank.
        observer: is shown what became of the candidates; None is nobody.
        num_heads: K.
        num_guesses: of each head, k.

    """

    def __init__(
        self, curve: LogisticCurve, observer: Observer | None, *, num_heads: int, num_guesses: int
    ) -> None:
        self._curve = curve
        self._observer = observer
        self._groups = head_groups(num_heads, num_guesses)
        self._last: tuple[Guesses, Floats] | None = None

    def guess(self, tokens: Ints, probability: Floats) -> Guesses:
        """Return the guesses with the probability that each is right.

        Args:
            tokens: [B, K, k] guesses of each head, the likeliest first.
            probability: [B, K, k] that the head gives them.

        """
        features = head_features(probability)
        # One layout, for which all is compiled ahead.
        guesses = Guesses(np.ascontiguousarray(tokens), self._curve.predict(features, self._groups))
        self._last = (guesses, features)
        return guesses

    def learn(self, emitted: Emitted) -> None:
        """Compare the last step's guesses with what the texts then were.

        A guess counts where the text went through its parent, whoever proposed that.
        """
        if self._last is None or self._observer is None:
            return
        guesses, features = self._last
        self._last = None
        self._observer.observe(
            *_observations(
                *(guesses.tokens, features, self._groups, guesses.probability),
                *(emitted.tokens, emitted.counts),
            )
        )
        self._observer.end_step()


@compiled
def _observations(
    tokens: Ints, features: Floats, groups: Ints, probability: Floats, emitted: Ints, counts: Ints
) -> tuple[Floats, Ints, Floats, Bools]:
    """Return what an `Observer` is shown of guesses [B, K, k] whose parents were right.

    Args:
        tokens, probability: of `Guesses`.
        features: [B, K, k, 1].
        groups: [K, k].
        emitted, counts: of `Emitted`.

    """
    num_requests, num_heads, num_guesses = tokens.shape
    known = np.minimum(counts[:num_requests], min(num_heads, emitted.shape[1]))
    size = num_guesses * known.sum()
    seen_features, seen_groups = np.empty((size, 1)), np.empty(size, np.int64)
    predicted, right = np.empty(size), np.empty(size, np.bool_)
    place = 0
    for row in range(num_requests):
        for head in range(known[row]):
            for rank in range(num_guesses):
                seen_features[place, 0] = features[row, head, rank, 0]
                seen_groups[place] = groups[head, rank]
                predicted[place] = probability[row, head, rank]
                right[place] = tokens[row, head, rank] == emitted[row, head]
                place += 1
    return seen_features, seen_groups, predicted, right
