"""Candidates out of the places in a text at which its last tokens, or another's, stood before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_medusa.draft.compiled import along_paths, compiled
from vllm_medusa.draft.learning import LogisticCurve, Observer, predict
from vllm_medusa.draft.probability import text_features
from vllm_medusa.draft.proposer import Proposed
from vllm_medusa.draft.text_index import AHEAD, BEHIND, TextIndex, match_lengths
from vllm_medusa.draft.trie import Trie, build_trie
from vllm_medusa.draft.types import Candidates, Floats, Ints, Source

#: Places of a request that are read: those with the longest match, then the latest.
MAX_PLACES = 8
#: Factor on the weight of a place for each additional token of its match.
_WEIGHT_OF_MATCH = 1.5
#: Less probable paths are not proposed: they never pay.
_MIN_PATH_PROBABILITY = 1e-3


class Continuations(Proposed):
    """Makes candidates from the tokens that follow places in texts.

    Args:
        source: source of the candidates.
        curve: gives the nodes' probabilities.
        observer: gets the outcomes of the candidates; None: no observer.
        max_depth: depth of the trees, at most `AHEAD`.

    """

    def __init__(
        self, source: Source, curve: LogisticCurve, observer: Observer | None, *, max_depth: int
    ) -> None:
        super().__init__(observer)
        self._source = source
        self._curve = curve
        self._depth = min(max_depth, AHEAD)

    def propose(
        self,
        places: Sequence[Sequence[int]],
        indexes: Sequence[TextIndex],
        endings: Sequence[NDArray[np.int32]],
    ) -> Candidates:
        """Return the candidates of B requests.

        Args:
            places: [B] of each request, at most `MAX_PLACES`, the best first.
            indexes: [B] the text that they are places of.
            endings: [B] last tokens of each request, as `TextIndex.ending` has them.

        """
        if not any(places):
            return self.keep_none()
        counts = np.array([len(found) for found in places], dtype=np.int64)
        windows = np.concatenate(
            [index.windows(found) for index, found in zip(indexes, places, strict=True) if found]
        )
        request, parents, tokens, probability, levels, features = _candidates(
            windows,
            counts,
            np.concatenate(endings).reshape(-1, BEHIND),
            self._depth,
            *(self._curve.slopes, self._curve.bias),
        )
        source = np.full(len(tokens), int(self._source))
        candidates = Candidates(request, parents, tokens, probability, source, levels)
        return self.keep(candidates, features, np.zeros(len(tokens), dtype=np.int64))


@compiled
def _candidates(
    windows: NDArray[np.int32],
    counts: Ints,
    endings: NDArray[np.int32],
    max_depth: int,
    slopes: Floats,
    bias: Floats,
) -> tuple[Ints, Ints, Ints, Floats, Ints, Floats]:
    """Make candidates of what follows places.

    Args:
        windows: [rows, BEHIND + AHEAD] around the places of all B requests.
        counts: [B] places of each request.
        endings: [B, BEHIND] of each request.
        max_depth: of the trees.
        slopes, bias: of the curve.

    Returns:
        Request, parents, tokens, probability and levels as `Candidates` has them, and [n, 5]
        features.

    """
    size = len(windows)
    request = np.empty(size, np.int64)
    ahead, ends = np.empty((size, max_depth), np.int32), np.empty((size, BEHIND), np.int32)
    row = 0
    for owner, count in enumerate(counts):
        for _ in range(count):
            request[row] = owner
            for column in range(max_depth):
                ahead[row, column] = windows[row, BEHIND + column]
            for column in range(BEHIND):
                ends[row, column] = endings[owner, column]
            row += 1
    match = match_lengths(windows, ends)
    longest, weight = np.zeros(len(counts), np.int64), np.empty(size)
    for row in range(size):
        longest[request[row]] = max(longest[request[row]], match[row])
    for row in range(size):
        weight[row] = _WEIGHT_OF_MATCH ** (match[row] - longest[request[row]])
    trie = build_trie(request, ahead, weight, match, len(counts))
    features = text_features(trie)
    given = predict(features, np.zeros(1, np.int64), slopes, bias)
    return _likely(trie, features, given, max_depth)


@compiled
def _likely(
    trie: Trie, features: Floats, given: Floats, max_depth: int
) -> tuple[Ints, Ints, Ints, Floats, Ints, Floats]:
    """Return what `_candidates` returns: the nodes [n] that are probable enough."""
    paths = along_paths(trie.parents, given)
    places = np.full(len(paths), -1)
    levels = np.zeros(max_depth + 1, np.int64)
    size = 0
    for node, path in enumerate(paths):
        if path >= _MIN_PATH_PROBABILITY:
            places[node] = size
            size += 1
        levels[trie.depths[node]] = size
    for depth in range(1, max_depth + 1):
        levels[depth] = max(levels[depth], levels[depth - 1])
    request, parents = np.empty(size, np.int64), np.empty(size, np.int64)
    tokens, probability = np.empty(size, np.int64), np.empty(size)
    seen = np.empty((size, features.shape[1]))
    for node, place in enumerate(places):
        if place >= 0:
            above = trie.parents[node]
            request[place], tokens[place] = trie.request[node], trie.tokens[node]
            parents[place] = places[above] if above >= 0 else -1
            probability[place] = given[node]
            for column in range(features.shape[1]):
                seen[place, column] = features[node, column]
    return request, parents, tokens, probability, levels, seen
