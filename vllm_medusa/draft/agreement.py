"""What a candidate is worth where the heads and a text both say what comes next.

The curve of a source knows this source only. But a token that both propose is nearly always right,
and one that only one of them proposes, while the other proposes something else, is rarely right. So
the *agreement curve* gives candidates in three groups another probability: those of both sources;
those of the heads where a text proposes other tokens below the same parent; and those of a text
where the heads guess other tokens. Its features are two log-odds: those of the candidate by its own
source, and those by the other source, of the candidate or of the best of its rivals. All other
candidates keep their source's probability.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vllm_medusa.draft.compiled import compiled
from vllm_medusa.draft.learning import LogisticCurve, Observer, log_odds, sigmoid
from vllm_medusa.draft.proposer import observations
from vllm_medusa.draft.superset import Superset
from vllm_medusa.draft.types import Bools, Candidates, Emitted, Floats, Guesses, Ints

NUM_GROUPS = 3
#: Each group has slopes of its own for the log-odds by the heads and by the text.
NUM_SLOPES = 2 * NUM_GROUPS
BOTH, HEADS_ALONE, TEXT_ALONE = range(NUM_GROUPS)
_NONE = -1


class Agreed(NamedTuple):
    """Candidates of heads and texts: for B requests S paths of the superset each, and n others.

    Attributes:
        heads: [B, S + 1] probability of each path, given that its parent is right; 1 at the end.
        others: [n] the same of the candidates of other sources.
        groups: [B * S + n] group of each candidate, -1 for none: first the paths, then the others.
        features: [B * S + n, 6] log-odds by the heads and by the text, in the columns of the group.

    """

    heads: Floats
    others: Floats
    groups: Ints
    features: Floats


@compiled
def agree(
    parents: Ints,
    heads: Floats,
    request: Ints,
    hosts: Ints,
    beside: Ints,
    others: Floats,
    slopes: Floats,
    bias: Floats,
) -> Agreed:
    """Apply the agreement curve.

    Args:
        parents: [S] of the superset.
        heads: [B, S + 1] probability of each path given its parent, by the heads.
        request: [n] of the candidates of other sources.
        hosts: [n] each one's place on the superset; -1 if it has none.
        beside: [n] its parent's place there, S for the root; -1 if it has none.
        others: [n] its probability given its parent, by its source.
        slopes, bias: of the curve.

    """
    num_requests, size = heads.shape[0], heads.shape[1] - 1
    texts = np.zeros((num_requests, size + 1))  # of the same token, by the text
    best_texts = np.zeros((num_requests, size + 1))  # of the tokens below each place
    best_heads = np.zeros((num_requests, size + 1))
    for node in range(len(others)):
        row = request[node]
        if beside[node] >= 0:
            best_texts[row, beside[node]] = max(best_texts[row, beside[node]], others[node])
        if hosts[node] >= 0:
            texts[row, hosts[node]] = others[node]
    groups = np.full(num_requests * size + len(others), _NONE)
    features = np.zeros((len(groups), NUM_SLOPES))
    given_heads, given_others = heads.copy(), others.copy()
    for row in range(num_requests):
        for place in range(size):
            above, by_heads = parents[place], heads[row, place]
            best_heads[row, above] = max(best_heads[row, above], by_heads)
            by_text = texts[row, place]
            if best_texts[row, above] == 0:
                continue
            group = BOTH if by_text > 0 else HEADS_ALONE
            by_text = by_text if by_text > 0 else best_texts[row, above]
            at = row * size + place
            groups[at] = group
            given_heads[row, place] = _predict(
                features[at], group, log_odds(by_heads), log_odds(by_text), slopes, bias
            )
    for node in range(len(others)):
        if hosts[node] < 0 and beside[node] >= 0 and best_heads[request[node], beside[node]] > 0:
            at = num_requests * size + node
            groups[at] = TEXT_ALONE
            by_heads = best_heads[request[node], beside[node]]
            given_others[node] = _predict(
                features[at], TEXT_ALONE, log_odds(by_heads), log_odds(others[node]), slopes, bias
            )
    return Agreed(given_heads, given_others, groups, features)


@compiled
def _predict(
    features: Floats, group: int, by_heads: float, by_text: float, slopes: Floats, bias: Floats
) -> float:
    """Write a candidate's features [6], and return its probability."""
    features[2 * group], features[2 * group + 1] = by_heads, by_text
    return sigmoid(slopes[2 * group] * by_heads + slopes[2 * group + 1] * by_text + bias[group])


class Agreement:
    """The agreement curve, and the last step's candidates, to learn from.

    Args:
        curve: the curve.
        observer: gets the outcomes of the candidates; None: no observer.
        superset: the rank paths.

    """

    def __init__(self, curve: LogisticCurve, observer: Observer | None, superset: Superset) -> None:
        self.curve = curve
        self._observer = observer
        self._superset = superset
        self._last: tuple[Guesses, Candidates, Agreed] | None = None

    def keep(self, guesses: Guesses, others: Candidates, agreed: Agreed) -> None:
        """Keep a step's candidates, to learn from."""
        self._last = guesses, others, agreed

    def learn(self, emitted: Emitted) -> None:
        """Compare the last step's candidates with the tokens that followed."""
        if self._observer is None:
            return
        if self._last is not None:
            guesses, others, agreed = self._last
            self._observer.observe(
                *_observations(
                    *(self._superset.parents, self._superset.cells, guesses.tokens),
                    *(others.request, others.parents, others.tokens),
                    *(agreed, emitted.tokens, emitted.counts),
                )
            )
        self._last = None
        self._observer.end_step()


@compiled
def _observations(
    parents: Ints,
    cells: Ints,
    guesses: Ints,
    request: Ints,
    other_parents: Ints,
    other_tokens: Ints,
    agreed: Agreed,
    emitted: Ints,
    counts: Ints,
) -> tuple[Floats, Ints, Floats, Bools]:
    """Return the arguments of `Observer.observe` for candidates whose parents were right.

    Args:
        parents, cells: of the superset.
        guesses: [B, T, k] tokens of the heads.
        request, other_parents, other_tokens: of the candidates of other sources.
        agreed: of the step.
        emitted, counts: of `Emitted`.

    """
    num_requests, num_guesses, size = len(guesses), guesses.shape[2], len(parents)
    num_paths, num_all = num_requests * size, len(agreed.groups)
    requests, tokens = np.empty(num_all, np.int64), np.empty(num_all, np.int64)
    above, probability = np.full(num_all, -1), np.empty(num_all)
    for at in range(num_paths):
        row, place = at // size, at % size
        requests[at], probability[at] = row, agreed.heads[row, place]
        tokens[at] = guesses[row, cells[place] // num_guesses, cells[place] % num_guesses]
        if parents[place] < size:
            above[at] = row * size + parents[place]
    for node in range(len(other_tokens)):
        at = num_paths + node
        requests[at], probability[at] = request[node], agreed.others[node]
        tokens[at] = other_tokens[node]
        if other_parents[node] >= 0:
            above[at] = num_paths + other_parents[node]
    return observations(
        *(requests, above, tokens, emitted, counts, agreed.features, agreed.groups, probability)
    )
