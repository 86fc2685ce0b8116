"""The heads' guesses: the same for all paths of a depth (arXiv 2401.10774, section 2.1).

With a selector a head's guesses depend on the parent.
"""

from __future__ import annotations

import numpy as np

from vllm_medusa.draft.compiled import compiled
from vllm_medusa.draft.learning import LogisticCurve, Observer
from vllm_medusa.draft.probability import head_features, head_groups
from vllm_medusa.draft.superset import Superset
from vllm_medusa.draft.types import Bools, Emitted, Floats, Guesses, Ints


class HeadsSource:
    """Turns the heads' guesses into probabilities.

    Args:
        curve: gives the probabilities, from the head's own probability, depth and rank.
        observer: gets the outcomes of the candidates; None: no observer.
        superset: the rank paths, which name the guesses.

    """

    def __init__(self, curve: LogisticCurve, observer: Observer | None, superset: Superset) -> None:
        self._curve = curve
        self._observer = observer
        self._superset = superset
        self._groups = head_groups(superset.num_heads, superset.num_guesses)[superset.heads]
        self._last: tuple[Guesses, Floats] | None = None

    def guess(self, tokens: Ints, probability: Floats) -> Guesses:
        """Return the guesses with the probability that each is right.

        Args:
            tokens: [B, T, k] guesses of the superset's tables, the most probable first.
            probability: [B, T, k] the head's own probabilities of them.

        """
        features = head_features(probability)
        # One memory layout, for which the functions are compiled ahead.
        guesses = Guesses(np.ascontiguousarray(tokens), self._curve.predict(features, self._groups))
        self._last = (guesses, features)
        return guesses

    def learn(self, emitted: Emitted) -> None:
        """Compare the last step's guesses with the tokens that followed.

        A guess counts if its parent was right, whatever the parent's source.
        """
        if self._last is None or self._observer is None:
            return
        guesses, features = self._last
        self._last = None
        self._observer.observe(
            *_observations(
                *(self._superset.children, self._superset.tables),
                *(guesses.tokens, features, self._groups, guesses.probability),
                *(emitted.tokens, emitted.counts),
            )
        )
        self._observer.end_step()


@compiled
def _observations(
    children: Ints,
    tables: Ints,
    tokens: Ints,
    features: Floats,
    groups: Ints,
    probability: Floats,
    emitted: Ints,
    counts: Ints,
) -> tuple[Floats, Ints, Floats, Bools]:
    """Return the arguments of `Observer.observe` for guesses [B, T, k] whose parents were right.

    Args:
        children, tables: of the superset.
        tokens, probability: of `Guesses`.
        features: [B, T, k, 1].
        groups: [T, k].
        emitted, counts: of `Emitted`.

    """
    num_requests, _, num_guesses = tokens.shape
    along = _tables_along(children, tables, tokens, emitted, counts)
    size = num_guesses * (along >= 0).sum()
    seen_features, seen_groups = np.empty((size, 1)), np.empty(size, np.int64)
    predicted, right = np.empty(size), np.empty(size, np.bool_)
    place = 0
    for row in range(num_requests):
        for depth, table in enumerate(along[row]):
            if table < 0:
                break
            for rank in range(num_guesses):
                seen_features[place, 0] = features[row, table, rank, 0]
                seen_groups[place] = groups[table, rank]
                predicted[place] = probability[row, table, rank]
                right[place] = tokens[row, table, rank] == emitted[row, depth]
                place += 1
    return seen_features, seen_groups, predicted, right


@compiled
def _tables_along(children: Ints, tables: Ints, tokens: Ints, emitted: Ints, counts: Ints) -> Ints:
    """Return [B, K] the table of guesses at each depth of the text; -1: there is none.

    The arguments are those of `_observations`.
    """
    root, nobody = len(children) - 2, -1
    num_heads = min(len(tables), emitted.shape[1])
    along = np.full((len(tokens), num_heads), -1)
    for row in range(len(tokens)):
        place = root
        for depth in range(min(counts[row], num_heads)):
            table = along[row, depth] = tables[depth, place]
            if table < 0:
                break
            above, place = place, nobody
            for rank in range(tokens.shape[2]):
                if tokens[row, table, rank] == emitted[row, depth]:
                    place = children[above, rank]
                    break
    return along
