"""What prefix attention gives the heads in an engine, against whole texts by `transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integration.command_line import DEMO_MODEL
from tests.oracles.prefix import in_context
from vllm_medusa.heads import load_heads
from vllm_medusa.heads.prefix import PrefixAttention
from vllm_medusa.plugin.worker.prefix import PrefixContext, PrefixPlaces
from vllm_medusa.target.frozen import load_target


@dataclass(frozen=True)
class State:
    """What the heads read at one position, with the token after it."""

    position: int
    root: int
    state: Tensor


@contextmanager
def states_kept() -> Iterator[list[State]]:
    """Keep what the heads of this process read."""
    kept: list[State] = []
    original = PrefixContext.at

    def at(self: Any, hidden: Tensor, roots: Tensor, where: PrefixPlaces) -> Tensor:
        states = original(self, hidden, roots, where)
        if int(where.places.max()) < self.nowhere:  # not in a warm-up
            rows = zip(where.positions.tolist(), roots.tolist(), states.clone(), strict=True)
            kept.extend(State(*row) for row in rows)
        return states

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixContext, "at", at)
        yield kept


def texts_of(outputs: Any) -> list[list[int]]:
    """Prompts with their answers."""
    return [[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs]


class WholeTexts:
    """The demo's target and a prefix attention along whole texts, in float32."""

    def __init__(self, heads: Path) -> None:
        tensors = load_heads(heads, target_vocab_size=4096).tensors
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}
        self._layer = PrefixAttention.from_tensors(self.tensors, torch.float32)
        self._target = load_target(str(DEMO_MODEL), revision=None, dtype=torch.float32)
        self.embedding = self._target.embedding.detach()

    @torch.no_grad()
    def states(self, text: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """[S, H] states that the heads read, [S, H] hidden states and [S, E] embeddings after."""
        tokens, positions = torch.tensor([text[:-1]]), torch.arange(len(text) - 1)[None]
        hidden = self._target.hidden(tokens, positions)
        following = self._target.embedding[torch.tensor([text[1:]])]
        return self._layer.along(hidden, following, positions)[0], hidden[0], following[0]

    def check(self, kept: Sequence[State], texts: Sequence[Sequence[int]]) -> None:
        """Check that each state is that of one of the texts at its position.

        Rows of static trees that have sampled nothing, and what was accepted beyond the last token
        that the user gets, are in none.
        """
        found = [self.states(text)[:2] for text in texts]
        num_checked = 0
        for item in kept:
            wanted = [
                (states[item.position], hidden[item.position])
                for text, (states, hidden) in zip(texts, found, strict=True)
                if item.position + 1 < len(text) and text[item.position + 1] == item.root
            ]
            if not wanted:
                continue
            num_checked += 1
            distances = [float((state - item.state).abs().max()) for state, _ in wanted]
            nearest = min(range(len(wanted)), key=distances.__getitem__)
            assert distances[nearest] < 1e-3
            # What the layer adds is much more than this.
            assert (wanted[nearest][1] - item.state).abs().max() > 0.02
        assert num_checked > 0.6 * len(kept)

    def state_with(self, text: Sequence[int], position: int, known: Sequence[int]) -> Tensor:
        """[H] at one position, from these positions alone."""
        _, hidden, following = self.states(text)
        return in_context(self.tensors, hidden, following, position, known)
