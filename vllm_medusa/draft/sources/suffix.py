"""Continuations by the suffix trees of `arctic-inference`, the library that vLLM's ``suffix`` uses.

It is called as vLLM 0.32 does (``vllm/v1/spec_decode/suffix_decoding.py``), but asked for trees
(SuffixDecoding, arXiv 2411.04975).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from vllm_medusa.draft.learning import LogisticCurve, Observer
from vllm_medusa.draft.probability import suffix_features
from vllm_medusa.draft.proposer import Proposed
from vllm_medusa.draft.types import Candidates, Emitted, Ints, Request, Source

_LIBRARY = "arctic_inference.suffix_decoding"
#: Longest match and continuation together.
_MAX_TREE_DEPTH = 64
#: Nodes of a tree, and how many more for each token that matches. vLLM has 1 for the latter: it
#: has no other judge of what pays.
_MAX_NODES = 32
_NODES_BY_MATCH = 4.0
_MIN_PATH_PROBABILITY = 0.02


def is_installed() -> bool:
    """Whether the library is there."""
    try:
        return find_spec(_LIBRARY) is not None
    except ModuleNotFoundError:
        return False


class SuffixSource:
    """Proposes the trees of a suffix cache.

    Args:
        curve: turns the library's shares into probabilities.
        observer: is shown what became of the candidates; None is nobody.
        max_depth: of the trees.
        max_finished: outputs of so many requests that have finished are searched too. 0 is none:
            by how fast a text comes, a user can find out that another was given the same.
        cache: a ``SuffixDecodingCache``; None makes one.

    """

    def __init__(
        self,
        curve: LogisticCurve,
        observer: Observer | None,
        *,
        max_depth: int,
        max_finished: int = 0,
        cache: Any = None,
    ) -> None:
        if cache is None:
            from arctic_inference.suffix_decoding import SuffixDecodingCache

            cache = SuffixDecodingCache(_MAX_TREE_DEPTH, max_cached_requests=max_finished)
        self._cache = cache
        self._curve = curve
        self._proposed = Proposed(observer)
        self._max_depth = max_depth
        self._num_added: dict[str, int] = {}

    def propose(self, requests: Sequence[Request]) -> Candidates:
        """Return the candidates of a step."""
        trees = [self._speculate(request) for request in requests]
        sizes = [len(tree.token_ids) for tree in trees]
        if not sum(sizes):
            return self._proposed.keep_none()
        offsets = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
        parents = np.concatenate([np.array(tree.parents, dtype=np.int64) for tree in trees])
        parents = np.where(parents < 0, -1, parents + offsets)
        depths = _depths(parents)
        paths = np.concatenate([np.array(tree.probs, dtype=np.float64) for tree in trees])
        tokens = np.concatenate([np.array(tree.token_ids, dtype=np.int64) for tree in trees])
        match = np.repeat([max(1, tree.match_len) for tree in trees], sizes)
        features = suffix_features(paths / np.append(paths, 1.0)[parents], match, depths)
        order = np.argsort(depths, kind="stable")
        order = order[: np.searchsorted(depths[order], self._max_depth, side="right")]
        places = np.full(len(parents) + 1, -1)
        places[order] = np.arange(len(order))
        groups = np.zeros(len(order), dtype=np.int64)
        candidates = Candidates(
            request=np.repeat(np.arange(len(sizes)), sizes)[order],
            parents=places[parents[order]],
            tokens=tokens[order],
            probability=self._curve.predict(features[order], groups),
            source=np.full(len(order), int(Source.SUFFIX)),
            levels=np.searchsorted(depths[order], np.arange(1, self._max_depth + 2)),
        )
        return self._proposed.keep(candidates, features[order], groups)

    def learn(self, emitted: Emitted) -> None:
        """Compare the last step's candidates with what the texts then were."""
        self._proposed.learn(emitted)

    def finish(self, key: str) -> None:
        """Drop a request's tree; its output stays in the cache if outputs are kept."""
        if self._num_added.pop(key, None) is not None:
            self._cache.stop_request(key)

    def _speculate(self, request: Request) -> Any:
        """Return the library's tree for a request, after showing it the new tokens."""
        tokens = np.ascontiguousarray(request.tokens, dtype=np.int32)
        if request.key not in self._num_added:
            self._cache.start_request(request.key, tokens[: request.num_prompt_tokens])
            self._num_added[request.key] = request.num_prompt_tokens
        new = tokens[self._num_added[request.key] :]
        self._cache.add_active_response(request.key, new)
        self._num_added[request.key] = len(tokens)
        return self._cache.speculate(
            request.key,
            tokens[-_MAX_TREE_DEPTH:],
            max_spec_tokens=_MAX_NODES,
            max_spec_factor=_NODES_BY_MATCH,
            min_token_prob=_MIN_PATH_PROBABILITY,
            use_tree_spec=True,
        )


def _depths(parents: Ints) -> Ints:
    """[n] depth of each node; parents come before their children."""
    depth, above = np.ones(len(parents) + 1, dtype=np.int64), np.append(parents, -1)
    depth[-1] = 0
    while (above >= 0).any():
        depth += depth[above]
        above = above[above]
    return depth[:-1]
