"""The interface of sources other than the heads, and how they learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vllm_medusa.draft.compiled import compiled
from vllm_medusa.draft.learning import Observer
from vllm_medusa.draft.types import Bools, Candidates, Emitted, Floats, Ints, Request


class Proposer(Protocol):
    """A source of candidates that reads the requests' texts."""

    def propose(self, requests: Sequence[Request]) -> Candidates:
        """Return the candidates of a step; new requests are added."""

    def learn(self, emitted: Emitted) -> None:
        """Compare the last step's candidates with the tokens that followed."""

    def finish(self, key: str) -> None:
        """Drop the data of a request that has ended; an unknown one is ignored."""


class Proposed:
    """The candidates of the last step and their features, to learn from.

    Args:
        observer: gets their outcomes; None: no observer.

    """

    def __init__(self, observer: Observer | None) -> None:
        self._observer = observer
        self._last: tuple[Candidates, Floats, Ints] | None = None

    def keep(self, candidates: Candidates, features: Floats, groups: Ints) -> Candidates:
        """Keep the candidates [n], their features [n, F] and groups [n]; return the candidates."""
        self._last = (candidates, features, groups)
        return candidates

    def keep_none(self) -> Candidates:
        """Return no candidates."""
        self._last = None
        return Candidates.none()

    def learn(self, emitted: Emitted) -> None:
        """Give the observer the candidates whose parent was right."""
        if self._observer is None:
            return
        if self._last is not None:
            candidates, features, groups = self._last
            self._observer.observe(
                *observations(
                    *(candidates.request, candidates.parents, candidates.tokens),
                    *(emitted.tokens, emitted.counts),
                    features,
                    groups,
                    candidates.probability,
                )
            )
        self._last = None
        self._observer.end_step()


@compiled
def outcomes(
    request: Ints, parents: Ints, tokens: Ints, emitted: Ints, counts: Ints
) -> tuple[Bools, Bools]:
    """Return the outcomes of candidates, in which parents come before their children.

    Returns:
        [n] whether the text went through the parent and the token after it is known; [n] whether
        the text went through the candidate itself.

    """
    observed, right = np.zeros(len(tokens), np.bool_), np.zeros(len(tokens), np.bool_)
    depths = np.zeros(len(tokens), np.int64)
    for node in range(len(tokens)):
        parent, row = parents[node], request[node]
        depth = depths[node] = 0 if parent < 0 else depths[parent] + 1
        observed[node] = depth < counts[row] and (parent < 0 or right[parent])
        right[node] = observed[node] and emitted[row, depth] == tokens[node]
    return observed, right


@compiled
def observations(
    request: Ints,
    parents: Ints,
    tokens: Ints,
    emitted: Ints,
    counts: Ints,
    features: Floats,
    groups: Ints,
    probability: Floats,
) -> tuple[Floats, Ints, Floats, Bools]:
    """Return the arguments of `Observer.observe` for candidates; those of group -1 are left out."""
    observed, right = outcomes(request, parents, tokens, emitted, counts)
    observed &= groups >= 0
    size = observed.sum()
    seen_features, seen_groups = np.empty((size, features.shape[1])), np.empty(size, np.int64)
    predicted, outcome = np.empty(size), np.empty(size, np.bool_)
    place = 0
    for node in range(len(observed)):
        if observed[node]:
            for column in range(features.shape[1]):
                seen_features[place, column] = features[node, column]
            seen_groups[place], predicted[place] = groups[node], probability[node]
            outcome[place] = right[node]
            place += 1
    return seen_features, seen_groups, predicted, outcome
