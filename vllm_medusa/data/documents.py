"""Texts of the target as arrays: what training and acceptance read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Document:
    """One row: a text of the target with its prompt.

    Attributes:
        tokens: [T] int32 token ids.
        is_answer: [T] bool, true on the tokens that the target wrote.
    """

    tokens: NDArray[np.int32]
    is_answer: NDArray[np.bool_]

    @property
    def num_learnt(self) -> int:
        """Tokens that the loss looks at: answer tokens that some position can predict."""
        return int(self.is_answer[1:].sum())


def answers_of(document: Document) -> list[tuple[int, int]]:
    """Return the answers of a row as ranges [start, stop) of tokens; a row of several turns has
    several. An answer at the very start is cut by the token that no position predicts.
    """
    flags = np.concatenate(([False], document.is_answer, [False]))
    flags[1] = False
    edges = np.flatnonzero(flags[1:] != flags[:-1])
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
