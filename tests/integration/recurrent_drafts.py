"""What recurrent heads draft in an engine, against whole texts by `transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.prefix_states import WholeTexts
from tests.oracles.recurrent import features
from vllm_medusa.plugin.worker.proposer import MedusaProposer
from vllm_medusa.tree.draft_tree import TreePath


@dataclass(frozen=True)
class Drafted:
    """The tokens of a static tree, from one position and the token after it."""

    position: int
    root: int
    tokens: list[int]


@contextmanager
def drafts_kept() -> Iterator[list[Drafted]]:
    """Keep the static trees that engines of this process draft."""
    kept: list[Drafted] = []
    original = MedusaProposer.propose

    def propose(self: Any, hidden: Any, roots: Any, ends: Any = None) -> Any:
        tokens = original(self, hidden, roots, ends)
        if int(ends.places.max()) < self.prefix.nowhere:  # not in a warm-up
            rows = zip(ends.positions.tolist(), list(map(int, roots)), tokens.tolist(), strict=True)
            kept.extend(Drafted(*row) for row in rows)
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MedusaProposer, "propose", propose)
        yield kept


class SlowDrafts:
    """Recurrent heads of the demo's target along whole texts, in float32."""

    def __init__(self, heads: Path) -> None:
        self._whole = WholeTexts(heads)
        self._window = self._whole.tensors["prefix.bias"].shape[1]
        self._embedding = self._whole.embedding

    def check(
        self,
        kept: Sequence[Drafted],
        texts: Sequence[Sequence[int]],
        paths: Sequence[TreePath],
        first_known: int = 0,
    ) -> None:
        """Check that each draft is what the heads draft at its position of one of the texts.

        Rows that have sampled nothing, and what was accepted beyond the last token that the user
        gets, are in none. Positions before the first known one are not in the memory.
        """
        found = [self._whole.states(text)[1:] for text in texts]
        num_checked = 0
        for item in kept:
            end = item.position + 1
            wanted = [
                self._draft(hidden[:end], following[:end], paths, first_known)
                for text, (hidden, following) in zip(texts, found, strict=True)
                if end < len(text) and text[end] == item.root
            ]
            if wanted:
                num_checked += 1
                assert item.tokens[: len(paths)] in wanted
        assert num_checked > 0.6 * len(kept)

    def _draft(
        self,
        hidden: torch.Tensor,
        following: torch.Tensor,
        paths: Sequence[TreePath],
        first_known: int,
    ) -> list[int]:
        known = range(max(first_known, len(hidden) - self._window), len(hidden))
        tokens: dict[TreePath, list[int]] = {(): []}
        best: dict[TreePath, list[int]] = {}
        for path in paths:
            above = path[:-1]
            if above not in best:
                drafted = list(self._embedding[tokens[above]])
                made = features(self._whole.tensors, hidden, following, known, drafted)
                best[above] = (self._embedding @ made).topk(16).indices.tolist()
            tokens[path] = [*tokens[above], best[above][path[-1]]]
        return [tokens[path][-1] for path in paths]
