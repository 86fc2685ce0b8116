"""The tokens that followed a request's last tokens in the outputs of finished requests.

Off by default: from the speed of a text, a user can find out that another user received the same
text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_medusa.draft.continuations import MAX_PLACES, Continuations
from vllm_medusa.draft.learning import LogisticCurve, Observer
from vllm_medusa.draft.text_index import BEHIND, NO_TOKEN, ORDERS, TextIndex, keys_of
from vllm_medusa.draft.types import Candidates, Emitted, Request, Source


class SharedTextSource:
    """Proposes the continuations in other requests' outputs.

    Args:
        curve: gives the nodes' probabilities.
        observer: gets the outcomes of the candidates; None: no observer.
        max_depth: largest depth of the trees.
        max_tokens: most tokens of outputs that are kept; then the older half is removed.

    """

    def __init__(
        self, curve: LogisticCurve, observer: Observer | None, *, max_depth: int, max_tokens: int
    ) -> None:
        self._continuations = Continuations(
            Source.SHARED_TEXT, curve, observer, max_depth=max_depth
        )
        self._finished = TextIndex(max_tokens)
        self._running: dict[str, list[int]] = {}

    def propose(self, requests: Sequence[Request]) -> Candidates:
        """Return the candidates of a step."""
        places, endings = [], []
        for request in requests:
            output = self._running.setdefault(request.key, [])
            start = request.num_prompt_tokens + len(output)
            output += request.tokens[start:].tolist()
            ending = np.full(BEHIND, NO_TOKEN, dtype=np.int32)
            last = request.tokens[-BEHIND:]
            ending[BEHIND - len(last) :] = last
            endings.append(ending)
            keys = keys_of(last[-ORDERS[-1] :].tolist())
            places.append(self._finished.places(keys, MAX_PLACES))
        return self._continuations.propose(places, [self._finished] * len(places), endings)

    def learn(self, emitted: Emitted) -> None:
        """Compare the last step's candidates with the tokens that followed."""
        self._continuations.learn(emitted)

    def finish(self, key: str) -> None:
        """Keep the output of a request that has ended."""
        # The mark ends the continuations of what is before it.
        self._finished.extend([*self._running.pop(key, []), NO_TOKEN])
