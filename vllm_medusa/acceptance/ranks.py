"""The rank that each head gives the right token, at every position that counts.

The hidden states are those that vLLM feeds the heads: the target's last ones, after its final norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_medusa.acceptance.statistics import RANK_CAP, Ranks
from vllm_medusa.acceptance.texts import Text, counted_positions
from vllm_medusa.reporting.progress import Progress
from vllm_medusa.target.frozen import FrozenTarget, chunk_size

#: Tokens of one forward pass, with the padding, where the caller has no wish.
_BATCH_TOKENS = 8192


class Heads(Protocol):
    """Medusa heads, in training (`training.model`) or read from files (`stored_heads`)."""

    @property
    def num_heads(self) -> int:
        """K."""

    def features(self, hidden: Tensor) -> Tensor:
        """Apply the residual blocks: [N, H] hidden states to [K, N, H]."""

    def logits(self, features: Tensor, head: int) -> Tensor:
        """Project one head's features: [N, H] to [N, V], minus infinity where it has no guess."""


@dataclass(frozen=True)
class Continuation:
    """One answer, as the statistics see it.

    Attributes:
        prompt_id: of its text.
        temperature: that it was sampled at; 0 is greedy.
        ranks: [positions, heads] int16, as `statistics` says.
        num_before_loop: the first so many positions lie before the answer begins to loop.

    """

    prompt_id: str
    temperature: float
    ranks: Ranks
    num_before_loop: int

    def ranks_of(self, *, with_loops: bool) -> Ranks:
        """Return the ranks of all positions, or of those before the loop."""
        return self.ranks if with_loops else self.ranks[: self.num_before_loop]


class RankMeter:
    """Runs the target and the heads over texts.

    Args:
        target: in the dtype to compute in.
        heads: on its device.
        batch_tokens: of one forward pass, with the padding; a longer text has one of its own.

    """

    def __init__(
        self, target: FrozenTarget, heads: Heads, batch_tokens: int = _BATCH_TOKENS
    ) -> None:
        self._target = target
        self._heads = heads
        self._batch_tokens = batch_tokens

    @torch.no_grad()
    def measure(self, texts: Sequence[Text], progress: Progress) -> list[Continuation]:
        """Measure every answer of every text, in order; ``progress`` counts texts."""
        found: dict[int, list[Continuation]] = {}
        for batch in self._batches(texts):
            found |= zip(batch, self._measure([texts[index] for index in batch]), strict=True)
            progress(len(batch))
        return [item for index in range(len(texts)) for item in found[index]]

    def _measure(self, texts: Sequence[Text]) -> list[list[Continuation]]:
        """Return the answers of each text of one batch."""
        hidden = self._hidden_states([text.token_ids for text in texts])
        num_heads, length = self._heads.num_heads, hidden.shape[1]
        answers = []
        # From no answer on: a batch may hold texts without one.
        states = [np.zeros(0, dtype=np.int64)]
        wanted = [np.zeros((0, num_heads), dtype=np.int64)]
        for row, text in enumerate(texts):
            for answer in text.answers:
                tokens = text.tokens_of(answer)
                counted = counted_positions(tokens, answer.has_ended, num_heads)
                answers.append(counted)
                # The heads guess what follows a root from the state that the root came from.
                states.append(row * length + answer.start - 1 + np.arange(counted.total))
                wanted.append(wanted_tokens(tokens, counted.total, num_heads))
        ranks = self._ranks(hidden.flatten(0, 1), np.concatenate(states), np.concatenate(wanted))
        parts = iter(np.split(ranks, np.cumsum([counted.total for counted in answers])[:-1]))
        before_loops = iter([counted.before_loop for counted in answers])
        return [
            [
                Continuation(text.prompt_id, text.temperature, next(parts), next(before_loops))
                for _ in text.answers
            ]
            for text in texts
        ]

    def _hidden_states(self, sequences: Sequence[list[int]]) -> Tensor:
        """Return [B, T, H]; what a shorter sequence is padded with comes behind it."""
        device = self._target.weight.device
        length = max(map(len, sequences))
        padded = [tokens + [0] * (length - len(tokens)) for tokens in sequences]
        tokens = torch.tensor(padded, device=device)
        return self._target.hidden(tokens, torch.arange(length, device=device)[None])

    def _ranks(self, hidden: Tensor, states: NDArray[np.int64], wanted: NDArray[np.int64]) -> Ranks:
        """Return [P, K] int16 ranks of the tokens ``wanted`` [P, K] by the ``hidden[states]``."""
        device = hidden.device
        features = self._heads.features(hidden[torch.from_numpy(states).to(device)])
        labels = torch.from_numpy(wanted).to(device)
        ranks = torch.empty(wanted.shape, dtype=torch.int16, device=device)
        size = chunk_size(self._target.vocab_size, device)
        for chunk in torch.split(torch.arange(len(states), device=device), size):
            for head in range(self._heads.num_heads):
                logits = self._heads.logits(features[head, chunk], head)
                ranks[chunk, head] = rank_of(logits, labels[chunk, head]).to(torch.int16)
        table: Ranks = ranks.cpu().numpy()
        return table

    def _batches(self, texts: Sequence[Text]) -> Iterator[list[int]]:
        """Yield indices of texts of similar length, so that little is padded."""
        batch: list[int] = []
        for index in sorted(range(len(texts)), key=lambda index: len(texts[index].token_ids)):
            if batch and (len(batch) + 1) * len(texts[index].token_ids) > self._batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def wanted_tokens(tokens: Sequence[int], num_positions: int, num_heads: int) -> NDArray[np.int64]:
    """Return [positions, heads]: the tokens that guesses must be to make a step longer; -1 is none.

    Head k guesses token p + 1 + k at position p. The answer's last token is none of them: the step
    that reaches it emits it whether it was guessed or not, and nothing follows it.
    """
    none = np.full(num_heads, -1)
    ahead = np.concatenate([np.array(tokens[1:-1], dtype=np.int64), none])
    return np.lib.stride_tricks.sliding_window_view(ahead, num_heads)[:num_positions]


def rank_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the tokens that a head ranks above each label.

    Args:
        logits: [N, V].
        labels: [N] int64; -1 is none.

    Returns:
        [N] int64, at most `RANK_CAP`, which is also the rank of a label that is none or whose
        logit is minus infinity.
    """
    value = logits.gather(-1, labels.clamp(min=0)[:, None])
    ranks = (logits > value).sum(dim=-1).clamp_(max=RANK_CAP)
    return ranks.masked_fill_((labels < 0) | value[:, 0].isneginf(), RANK_CAP)
