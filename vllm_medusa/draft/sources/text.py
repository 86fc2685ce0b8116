"""The tokens that followed earlier occurrences of a request's last tokens in its own text."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_medusa.draft.continuations import MAX_PLACES, Continuations
from vllm_medusa.draft.learning import LogisticCurve, Observer
from vllm_medusa.draft.text_index import TextIndex
from vllm_medusa.draft.types import Candidates, Emitted, Request, Source


class TextSource:
    """Proposes the continuations in a request's own prompt and output.

    Args:
        curve: gives the nodes' probabilities.
        observer: gets the outcomes of the candidates; None: no observer.
        max_depth: largest depth of the trees.
        max_tokens: of a longer text only the last tokens are searched, at least half of this
            number.

    """

    def __init__(
        self, curve: LogisticCurve, observer: Observer | None, *, max_depth: int, max_tokens: int
    ) -> None:
        self._continuations = Continuations(Source.TEXT, curve, observer, max_depth=max_depth)
        self._max_tokens = max_tokens
        self._indexes: dict[str, TextIndex] = {}

    def propose(self, requests: Sequence[Request]) -> Candidates:
        """Return the candidates of a step."""
        indexes = [self._updated(request) for request in requests]
        places = [index.places(index.keys, MAX_PLACES) for index in indexes]
        return self._continuations.propose(places, indexes, [index.ending() for index in indexes])

    def learn(self, emitted: Emitted) -> None:
        """Compare the last step's candidates with the tokens that followed."""
        self._continuations.learn(emitted)

    def finish(self, key: str) -> None:
        """Drop a request's index."""
        self._indexes.pop(key, None)

    def _updated(self, request: Request) -> TextIndex:
        """Return the request's index with all of its tokens."""
        index = self._indexes.get(request.key)
        if index is None or index.num_added > len(request.tokens):
            index = self._indexes[request.key] = TextIndex(self._max_tokens)
        index.extend(request.tokens[index.num_added :])
        return index
