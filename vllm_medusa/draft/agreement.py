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
        features: [B * S + n, 2] log-odds by the heads and by the text; arbitrary without a group.

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
    features = np.empty((len(groups), 2))
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
            features[at, 0], features[at, 1] = log_odds(by_heads), log_odds(by_text)
            given_heads[row, place] = _predict(features[at], group, slopes, bias)
    for node in range(len(others)):
        if hosts[node] < 0 and beside[node] >= 0 and best_heads[request[node], beside[node]] > 0:
            at = num_requests * size + node
            groups[at] = TEXT_ALONE
            features[at, 0] = log_odds(best_heads[request[node], beside[node]])
            features[at, 1] = log_odds(others[node])
            given_others[node] = _predict(features[at], TEXT_ALONE, slopes, bias)
    return Agreed(given_heads, given_others, groups, features)


@compiled
def _predict(features: Floats, group: int, slopes: Floats, bias: Floats) -> float:
    own = slopes[2 * group] * features[0] + slopes[2 * group + 1] * features[1]
    return sigmoid(own + bias[group])


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
                    *(self._superset.children, self._superset.tables, guesses.tokens),
                    *(others.request, others.parents, others.tokens, others.levels),
                    *(agreed, emitted.tokens, emitted.counts),
                )
            )
        self._last = None
        self._observer.end_step()


@compiled
def _observations(
    children: Ints,
    tables: Ints,
    guesses: Ints,
    request: Ints,
    other_parents: Ints,
    other_tokens: Ints,
    levels: Ints,
    agreed: Agreed,
    emitted: Ints,
    counts: Ints,
) -> tuple[Floats, Ints, Floats, Bools]:
    """Return the arguments of `Observer.observe` for candidates whose parents were right.

    Args:
        children, tables: of the superset.
        guesses: [B, T, k] tokens of the heads.
        request, other_parents, other_tokens, levels: of the candidates of other sources.
        agreed: of the step.
        emitted, counts: of `Emitted`.

    """
    num_requests, size = len(guesses), agreed.heads.shape[1] - 1
    seen, right = np.empty(len(agreed.groups), np.int64), np.empty(len(agreed.groups), np.bool_)
    count = 0
    for row in range(num_requests):
        count = _paths_along(
            *(row, row * size, children, tables, guesses, emitted[row, : counts[row]]),
            *(agreed.groups, seen, right, count),
        )
        count = _others_along(
            *(row, num_requests * size, request, other_parents, other_tokens, levels),
            *(emitted[row, : counts[row]], agreed.groups, seen, right, count),
        )
    features, groups = np.zeros((count, NUM_SLOPES)), np.empty(count, np.int64)
    predicted = np.empty(count)
    for place in range(count):
        at = seen[place]
        group = groups[place] = agreed.groups[at]
        features[place, 2 * group] = agreed.features[at, 0]
        features[place, 2 * group + 1] = agreed.features[at, 1]
        if at < num_requests * size:
            predicted[place] = agreed.heads[at // size, at % size]
        else:
            predicted[place] = agreed.others[at - num_requests * size]
    return features, groups, predicted, right[:count]


@compiled
def _paths_along(
    row: int,
    start: int,
    children: Ints,
    tables: Ints,
    guesses: Ints,
    text: Ints,
    groups: Ints,
    seen: Ints,
    right: Bools,
    count: int,
) -> int:
    """Add one request's paths whose parents the text goes through; return how many there are.

    Args:
        row: the request.
        start: place of its first path among all candidates.
        children, tables, guesses: as in `_observations`.
        text: the tokens that followed.
        groups: of all candidates; those without a group are left out.
        seen, right: get the places of the candidates and whether each is right.
        count: how many they hold.

    """
    above = len(children) - 2
    for depth in range(min(len(text), len(tables))):
        table, following = tables[depth, above], -1
        if table < 0:
            break
        for rank in range(children.shape[1]):
            child = children[above, rank]
            if child < 0:
                continue
            is_right = guesses[row, table, rank] == text[depth]
            if is_right:
                following = child
            if groups[start + child] >= 0:
                seen[count], right[count] = start + child, is_right
                count += 1
        if following < 0:
            break
        above = following
    return count


@compiled
def _others_along(
    row: int,
    start: int,
    request: Ints,
    parents: Ints,
    tokens: Ints,
    levels: Ints,
    text: Ints,
    groups: Ints,
    seen: Ints,
    right: Bools,
    count: int,
) -> int:
    """Do what `_paths_along` does for the candidates of other sources."""
    above = -1
    for depth in range(min(len(text), len(levels) - 1)):
        following = -1
        for node in range(levels[depth], levels[depth + 1]):
            if request[node] != row or parents[node] != above:
                continue
            is_right = tokens[node] == text[depth]
            if is_right:
                following = node
            if groups[start + node] >= 0:
                seen[count], right[count] = start + node, is_right
                count += 1
        if following < 0:
            break
        above = following
    return count
