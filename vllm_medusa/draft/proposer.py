"""What a source of candidates other than the heads is, and how such a source learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vllm_medusa.draft.learning import Observer
from vllm_medusa.draft.types import Bools, Candidates, Emitted, Floats, Ints, Request


class Proposer(Protocol):
    """A source of candidates that reads the requests' texts."""

    def propose(self, requests: Sequence[Request]) -> Candidates:
        """Return the candidates of a step; a request that is new is taken up."""

    def learn(self, emitted: Emitted) -> None:
        """Compare the last step's candidates with what the texts then were."""

    def finish(self, key: str) -> None:
        """Drop what is held for a request that has ended; an unknown one does no harm."""


class Proposed:
    """The candidates of the last step and what they were predicted from, to learn from.

    Args:
        observer: is shown what became of them; None is nobody.

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
        """Show the candidates whose parent the text went through."""
        if self._observer is None:
            return
        if self._last is not None:
            candidates, features, groups = self._last
            observed, right = outcomes(candidates, emitted)
            seen = np.flatnonzero(observed)
            self._observer.observe(
                features[seen], groups[seen], candidates.probability[seen], right[seen]
            )
        self._last = None
        self._observer.end_step()


def outcomes(candidates: Candidates, emitted: Emitted) -> tuple[Bools, Bools]:
    """Return what is known of candidates afterwards.

    Returns:
        [n] whether the text went through the parent and the token after it is known; [n] whether
        the text went through the candidate itself.

    """
    depths = candidates.depths
    place = np.minimum(depths, emitted.tokens.shape[1]) - 1
    known = depths <= emitted.counts[candidates.request]
    right = known & (emitted.tokens[candidates.request, place] == candidates.tokens)
    # Whether all from the root on are right; each turn looks twice as far up. The last is the root.
    path, above = np.append(right, True), np.append(candidates.parents, -1)
    while (above >= 0).any():
        path &= path[above]
        above = above[above]
    return known & path[candidates.parents], path[:-1]
