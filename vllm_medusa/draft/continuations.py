"""Candidates out of the places in a text at which its last tokens, or another's, stood before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_medusa.draft.compiled import along_paths
from vllm_medusa.draft.learning import LogisticCurve, Observer
from vllm_medusa.draft.probability import text_features
from vllm_medusa.draft.proposer import Proposed
from vllm_medusa.draft.text_index import AHEAD, BEHIND, TextIndex, match_lengths
from vllm_medusa.draft.trie import build_trie
from vllm_medusa.draft.types import Candidates, Emitted, Source

#: Places of a request that are read: those with the longest match, of these the latest.
MAX_PLACES = 8
#: How much more a place counts for each token that its match is longer.
_WEIGHT_OF_MATCH = 1.5
#: Paths that are less likely are not proposed: they pay nowhere.
_MIN_PATH_PROBABILITY = 1e-3


class Continuations:
    """Makes candidates of what follows places in texts.

    Args:
        source: whose candidates they are.
        curve: gives the nodes' probabilities.
        observer: is shown what became of the candidates; None is nobody.
        max_depth: of the trees, `AHEAD` at most.

    """

    def __init__(
        self, source: Source, curve: LogisticCurve, observer: Observer | None, *, max_depth: int
    ) -> None:
        self._source = source
        self._curve = curve
        self._proposed = Proposed(observer)
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
        counts = np.array([len(found) for found in places], dtype=np.int64)
        if not counts.any():
            return self._proposed.keep_none()
        windows = np.concatenate(
            [index.windows(found) for index, found in zip(indexes, places, strict=True) if found]
        )
        request = np.repeat(np.arange(len(counts)), counts)
        match = match_lengths(windows, np.stack(endings)[request])
        longest = np.maximum.reduceat(match, (np.cumsum(counts) - counts)[counts > 0])
        weight = _WEIGHT_OF_MATCH ** (match - np.repeat(longest, counts[counts > 0]))
        # One layout, for which `build_trie` is compiled ahead.
        ahead = np.ascontiguousarray(windows[:, BEHIND : BEHIND + self._depth])
        trie = build_trie(request, ahead, weight, match, len(counts))
        features = text_features(trie)
        groups = np.zeros(len(features), dtype=np.int64)
        given = self._curve.predict(features, groups)
        kept = np.flatnonzero(along_paths(trie.parents, given) >= _MIN_PATH_PROBABILITY)
        places_kept = np.full(len(given) + 1, -1)
        places_kept[kept] = np.arange(len(kept))
        depths = trie.depths[kept]
        candidates = Candidates(
            request=trie.request[kept],
            parents=places_kept[trie.parents[kept]],
            tokens=trie.tokens[kept],
            probability=given[kept],
            source=np.full(len(kept), int(self._source)),
            levels=np.searchsorted(depths, np.arange(1, self._depth + 2)),
        )
        return self._proposed.keep(candidates, features[kept], groups[kept])

    def learn(self, emitted: Emitted) -> None:
        """Compare the last step's candidates with what the texts then were."""
        self._proposed.learn(emitted)
