"""What the Medusa heads guess: per depth, whatever the path (arXiv 2401.10774, section 2.1)."""

from __future__ import annotations

import numpy as np

from vllm_medusa.draft.learning import LogisticCurve, Observer
from vllm_medusa.draft.probability import head_features, head_groups
from vllm_medusa.draft.types import Emitted, Floats, Guesses, Ints


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
        guesses = Guesses(tokens, self._curve.predict(features, self._groups))
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
        num_heads = min(guesses.tokens.shape[1], emitted.tokens.shape[1])
        row, head = np.nonzero(np.arange(num_heads) < emitted.counts[:, None])
        right = guesses.tokens[row, head] == emitted.tokens[row, head, None]
        self._observer.observe(
            features[row, head].reshape(right.size, -1),
            self._groups[head].ravel(),
            guesses.probability[row, head].ravel(),
            right.ravel(),
        )
        self._observer.end_step()
