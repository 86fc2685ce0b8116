"""The curves of all sources, and the file that calibration writes them to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_medusa.draft import agreement
from vllm_medusa.draft.compiled import compiled
from vllm_medusa.draft.learning import Learner, LogisticCurve, log_odds
from vllm_medusa.draft.superset import Superset
from vllm_medusa.draft.trie import Trie
from vllm_medusa.draft.types import Floats, Ints, Source
from vllm_medusa.errors import UserError
from vllm_medusa.tree.draft_tree import read_json

PROBABILITIES_FORMAT = "vllm_medusa.draft_probabilities/1"
PROBABILITIES_FILE = "medusa_probabilities.json"

#: First rank of each group of a head's guesses.
_RANK_GROUPS = (0, 1, 2, 3, 6)
#: Added to a share and to one minus the share, so that log-odds are finite.
_SHARE_PRIOR = 0.02
#: Place of the agreement curve among those of the sources (`agreement`).
AGREEMENT = Source.HEADS | Source.TEXT
#: Slopes and bias of curves that were never fitted, similar to those of the demo model's texts.
_DEFAULTS: dict[Source, tuple[Floats, float | Floats]] = {
    Source.HEADS: (np.array([0.9]), 0.0),
    AGREEMENT: (np.array([0.5, 0.7, 1.0, -0.55, -0.4, 1.2]), np.array([1.3, -1.0, -1.3])),
    Source.TEXT: (np.array([0.5, 0.8, 0.9, 1.0, 1.0]), -3.0),
    Source.SHARED_TEXT: (np.array([0.5, 0.8, 0.9, 1.0, 1.0]), -3.5),
}
#: Default shares at which a head's guesses are right, by rank.
_TYPICAL_HEAD = 0.5 / np.arange(1, 64) ** 1.7


@dataclass(frozen=True)
class Probabilities:
    """The curves that give candidates their probabilities.

    Attributes:
        curves: by source; the heads' curve has a group for each depth and range of ranks. That
            of `AGREEMENT` is for candidates where heads and text both propose tokens.
        superset: the heads' rank paths.

    """

    curves: Mapping[Source, LogisticCurve]
    superset: Superset

    @classmethod
    def default(cls, num_heads: int, num_guesses: int) -> Probabilities:
        """Return curves of ordinary heads and texts, to start from without a calibration."""
        by_rank = np.tile(_TYPICAL_HEAD[:num_guesses], (num_heads, 1))
        curves = {
            source: LogisticCurve(slopes, np.zeros(_num_groups(source, num_heads)) + bias)
            for source, (slopes, bias) in _DEFAULTS.items()
        }
        return cls(curves, Superset.from_product(by_rank))

    def learners(self) -> dict[Source, Learner]:
        """Return the learners of the curves."""
        return {source: Learner(curve) for source, curve in self.curves.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `from_dict` is the inverse."""
        curves = {name_of(source): curve.to_dict() for source, curve in self.curves.items()}
        paths = [list(path) for path in self.superset.paths()]
        return {"format": PROBABILITIES_FORMAT, "curves": curves, "paths": paths}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], num_heads: int, num_guesses: int
    ) -> Probabilities:
        """Read what `to_dict` made. A source without a curve gets the default one.

        Raises:
            UserError: it does not have this form, or belongs to other heads.

        """
        if values.get("format") != PROBABILITIES_FORMAT:
            raise UserError(
                f"the probabilities have format {values.get('format')!r} instead of "
                f"{PROBABILITIES_FORMAT!r}; calibrate again"
            )
        given, paths = values.get("curves"), values.get("paths")
        if not isinstance(given, dict) or not isinstance(paths, list) or not paths:
            raise UserError("the probabilities hold no curves or no list of paths; calibrate again")
        curves = dict(cls.default(num_heads, num_guesses).curves)
        for source in _DEFAULTS:
            if (name := name_of(source)) in given:
                size = len(_DEFAULTS[source][0]), _num_groups(source, num_heads)
                curves[source] = LogisticCurve.from_dict(given[name], name, *size)
        return cls(curves, Superset.from_paths(paths, num_heads, num_guesses))


def read_probabilities(path: Path, num_heads: int, num_guesses: int) -> Probabilities:
    """Read the file that a calibration wrote.

    Raises:
        UserError: it cannot be read, or is not such a file.

    """
    values = read_json(path, "probabilities file", "calibrate again")
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object; calibrate again")
    try:
        return Probabilities.from_dict(values, num_heads, num_guesses)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def probabilities_of_heads(heads: str, num_heads: int, num_guesses: int) -> Probabilities:
    """Read the file that a calibration wrote beside the heads, or return the default curves.

    Args:
        heads: directory of the heads; a file or a hub name has no file beside it.
        num_heads: K.
        num_guesses: k, guesses of each head.

    """
    file = Path(heads) / PROBABILITIES_FILE
    if file.is_file():
        return read_probabilities(file, num_heads, num_guesses)
    return Probabilities.default(num_heads, num_guesses)


def head_groups(num_heads: int, num_guesses: int) -> Ints:
    """Return [K, k]: group of each depth and rank."""
    by_rank = np.searchsorted(_RANK_GROUPS, np.arange(num_guesses), side="right") - 1
    groups: Ints = len(_RANK_GROUPS) * np.arange(num_heads)[:, None] + by_rank
    return groups


def head_features(probability: Floats) -> Floats:
    """Return [..., 1]: the log-odds of the heads' probabilities [...]."""
    return _log_odds(probability.ravel()).reshape(*probability.shape, 1)


@compiled
def _log_odds(probability: Floats) -> Floats:
    values = np.empty(len(probability))
    for place, chance in enumerate(probability):
        values[place] = log_odds(chance)
    return values


@compiled
def text_features(trie: Trie) -> Floats:
    """Return [n, 5] of the nodes of continuations.

    They are: the log-odds of the node's share of its parent's weight; the logarithms of the longest
    match, of the depth and of the number of occurrences; and whether the best of the parent's
    occurrences continues with this node.
    """
    features = np.empty((len(trie.tokens), 5))
    for node in range(len(features)):
        share = trie.weight[node] / trie.total[node]
        features[node, 0] = np.log((share + _SHARE_PRIOR) / (1 - share + _SHARE_PRIOR))
        features[node, 1] = np.log(trie.match[node])
        features[node, 2] = np.log(trie.depths[node])
        features[node, 3] = np.log(trie.count[node])
        features[node, 4] = trie.is_best[node]
    return features


def name_of(source: Source) -> str:
    """Return the name of a source's curve, in files and reports."""
    return "agreement" if source == AGREEMENT else str(source.name).lower()


def _num_groups(source: Source, num_heads: int) -> int:
    if source == AGREEMENT:
        return agreement.NUM_GROUPS
    return num_heads * len(_RANK_GROUPS) if source is Source.HEADS else 1
