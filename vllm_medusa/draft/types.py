"""Drafts and candidates as arrays.

B requests draft in a step. A node is one draft token of one request; the root, which is the
request's last token, is not a node here. `probability` is the probability that the target's own
text goes through the node: for a candidate given its parent, for a draft's node from the root on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]


class Source(IntFlag):
    """The source of a node; a node can have several."""

    HEADS = 1
    TEXT = 2
    SHARED_TEXT = 4


@dataclass(frozen=True)
class Request:
    """A request that drafts in a step.

    Attributes:
        key: its name while it runs.
        tokens: [L] its prompt and output so far; the last one is the root. Not kept after the
            call.
        num_prompt_tokens: how many of them are the prompt's.
        max_nodes: most nodes that it drafts; None: the engine's limit.
        max_leaves: most leaves of its tree; None: the engine's limit.

    """

    key: str
    tokens: NDArray[np.integer[Any]]
    num_prompt_tokens: int
    max_nodes: int | None = None
    max_leaves: int | None = None


@dataclass(frozen=True)
class Emitted:
    """The tokens that followed in each request of the last step, as far as they are known.

    Attributes:
        tokens: [B, E] int64, arbitrary after the known ones; E is at least 1.
        counts: [B] number of known ones; 0 if the request has ended.

    """

    tokens: Ints
    counts: Ints


@dataclass(frozen=True)
class Draft:
    """The tree of M nodes that one request drafts in one step.

    Nodes are in falling probability, so every prefix is a tree.

    Attributes:
        tokens: [M] token of each node.
        parents: [M] parent of each node: 0 is the root, ``i`` the node at place ``i - 1``.
        depths: [M] depth of each node; the root's children have 1.
        probability: [M] that the text goes through the node.
        source: [M] bits of `Source`.

    """

    tokens: Ints
    parents: Ints
    depths: Ints
    probability: Floats
    source: Ints

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Drafts(Sequence[Draft]):
    """The drafts of B requests, one after the other: T nodes in all.

    Attributes:
        tokens, parents, depths, probability, source: [T], as those of `Draft`.
        starts: [B + 1] where each request's nodes begin.

    """

    tokens: Ints
    parents: Ints
    depths: Ints
    probability: Floats
    source: Ints
    starts: Ints

    @classmethod
    def none(cls, num_requests: int) -> Drafts:
        """Return drafts without nodes for this many requests."""
        ints = np.zeros(0, dtype=np.int64)
        starts = np.zeros(num_requests + 1, dtype=np.int64)
        return cls(ints, ints, ints, np.zeros(0), ints, starts)

    @property
    def num_nodes(self) -> Ints:
        """[B] nodes of each request."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        nodes = slice(self.starts[index], self.starts[index + 1])
        return Draft(
            self.tokens[nodes],
            self.parents[nodes],
            self.depths[nodes],
            self.probability[nodes],
            self.source[nodes],
        )

    def __iter__(self) -> Iterator[Draft]:
        return (self[index] for index in range(len(self)))


@dataclass(frozen=True)
class Guesses:
    """What heads guess for B requests: T tables of k tokens each (`Superset`), likeliest first.

    Attributes:
        tokens: [B, T, k], contiguous; those of one table are all different.
        probability: [B, T, k] of each guess, given that its parent is right, in (0, 1).

    """

    tokens: Ints
    probability: Floats


@dataclass(frozen=True)
class Candidates:
    """The trees that a source proposes to B requests: n nodes in all, D the deepest.

    Nodes are in the order of their depths, and no two of one parent have the same token.

    Attributes:
        request: [n] request of each node, 0 to B - 1.
        parents: [n] place of each node's parent among these; -1 is the request's root.
        tokens: [n].
        probability: [n] given that the parent is right, in (0, 1).
        source: [n] bits of `Source`.
        levels: [D + 1] where the nodes of depth 1, 2, ... begin; the last is n.

    """

    request: Ints
    parents: Ints
    tokens: Ints
    probability: Floats
    source: Ints
    levels: Ints

    @classmethod
    def none(cls) -> Candidates:
        """Return no nodes."""
        ints = np.zeros(0, dtype=np.int64)
        return cls(ints, ints, ints, np.zeros(0), ints, np.zeros(1, dtype=np.int64))

    @property
    def depth(self) -> int:
        """Depth of the deepest node."""
        return len(self.levels) - 1

    @property
    def depths(self) -> Ints:
        """[n] depth of each node."""
        return np.repeat(np.arange(1, self.depth + 1), np.diff(self.levels))

    def level(self, depth: int) -> slice:
        """Return the places of the nodes of one depth."""
        return slice(int(self.levels[depth - 1]), int(self.levels[depth]))
