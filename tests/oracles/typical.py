"""Typical acceptance as section 3.3.1 of arXiv 2401.10774 tells it, path by path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def typical_path(
    parents: Sequence[int],
    drafts: Sequence[int],
    probs: Sequence[Sequence[float]],
    threshold: float,
    alpha: float,
) -> list[int]:
    """Return the nodes of the longest path of typical tokens, of several the likeliest.

    Args:
        parents: of each node, the root's included; negative: never accepted.
        drafts: token of each node; the root's does not matter.
        probs: the target's distribution at each node.
        threshold, alpha: of the rule.

    """
    paths: list[tuple[int, float, list[int]]] = [(0, 0.0, [0])]
    for node in range(1, len(parents)):
        for _, likelihood, path in list(paths):
            if path[-1] != parents[node]:
                continue
            at = probs[parents[node]]
            entropy = -sum(p * math.log(p) for p in at if p > 0)
            p = at[drafts[node]]
            if p > min(threshold, alpha * math.exp(-entropy)):
                paths.append((len(path), likelihood + math.log(p), [*path, node]))
    longest = max(length for length, _, _ in paths)
    return max((path for path in paths if path[0] == longest), key=lambda path: path[1])[2]


def taken_tokens(path: Sequence[int], drafts: Sequence[int], targets: Sequence[int]) -> list[int]:
    """Return the token taken at each node: the path's, and the target's samples elsewhere."""
    tokens = list(targets)
    for parent, node in itertools.pairwise(path):
        tokens[parent] = drafts[node]
    return tokens
