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
from vllm_medusa.acceptance.texts import Answer, Text, counted_positions
from vllm_medusa.heads.selector import Selector
from vllm_medusa.reporting.progress import Progress
from vllm_medusa.target.frozen import FrozenTarget, chunk_size

#: Default number of tokens of one forward pass, padding included.
_BATCH_TOKENS = 8192


class Heads(Protocol):
    """Medusa heads, in training (`training.model`) or read from files (`stored_heads`)."""

    @property
    def num_heads(self) -> int:
        """K."""

    @property
    def logit_scale(self) -> float:
        """Factor on the logits."""

    @property
    def selector(self) -> Selector | None:
        """Ranks each head's best guesses again."""

    def in_context(self, hidden: Tensor, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Run the prefix attention, if the heads have one; else return the states as they are.

        Args:
            hidden: [B, S, H] states.
            tokens: [B, S] int64, the texts.
            position_ids: [B, S] or [1, S] int64, from 0 in every text.

        Returns:
            [B, S, H]
        """

    def features(self, hidden: Tensor, following: Tensor) -> Tensor:
        """Compute what the lm_heads read.

        Args:
            hidden: [N, H] states, in context.
            following: [N, K] int64, the tokens after each: the root, and the parents of what the
                other heads guess.

        Returns:
            [K, N, F]
        """

    def logits(self, features: Tensor, head: int) -> Tensor:
        """Project one head's features: [N, F] to [N, V], minus infinity for unknown tokens."""


@dataclass(frozen=True)
class Guessed:
    """An answer with what the heads guess along it.

    Attributes:
        tokens: [L] of the text up to the answer's end.
        num_prompt_tokens: how many of them come before the answer.
        has_ended: whether the target ended the answer by itself.
        guesses: [positions, heads, k] int32, the likeliest first.
        probability: [positions, heads, k] float32 that the head gives them.

    """

    tokens: NDArray[np.int64]
    num_prompt_tokens: int
    has_ended: bool
    guesses: NDArray[np.int32]
    probability: NDArray[np.float32]


@dataclass(frozen=True)
class Continuation:
    """One answer, as the statistics see it.

    Attributes:
        prompt_id: of its text.
        temperature: that it was sampled at; 0 is greedy.
        ranks: [positions, heads] int16, as in `statistics`.
        num_before_loop: number of positions before the answer begins to loop.
        guessed: the heads' guesses, if the caller asked for them.
        category: of its prompt, if it has one.

    """

    prompt_id: str
    temperature: float
    ranks: Ranks
    num_before_loop: int
    guessed: Guessed | None = None
    category: str | None = None

    def ranks_of(self, *, with_loops: bool) -> Ranks:
        """Return the ranks of all positions, or of those before the loop."""
        return self.ranks if with_loops else self.ranks[: self.num_before_loop]


class RankMeter:
    """Runs the target and the heads over texts.

    Args:
        target: in the dtype to compute in.
        heads: on its device.
        batch_tokens: tokens of one forward pass, padding included; a longer text is a batch alone.
        num_guesses: guesses of each head to keep at each position; 0 keeps none.

    """

    def __init__(
        self,
        target: FrozenTarget,
        heads: Heads,
        batch_tokens: int = _BATCH_TOKENS,
        num_guesses: int = 0,
    ) -> None:
        self._target = target
        self._heads = heads
        self._batch_tokens = batch_tokens
        self._num_guesses = min(num_guesses, target.vocab_size)

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
        tokens_of_rows = self._padded([text.token_ids for text in texts])
        position_ids = torch.arange(tokens_of_rows.shape[1], device=tokens_of_rows.device)
        hidden = self._target.hidden(tokens_of_rows, position_ids[None])
        hidden = self._heads.in_context(hidden, tokens_of_rows, position_ids[None])
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
                # The heads guess the tokens after a root from the hidden state that gave the root.
                states.append(row * length + answer.start - 1 + np.arange(counted.total))
                wanted.append(wanted_tokens(tokens, counted.total, num_heads))
        at = torch.from_numpy(np.concatenate(states)).to(hidden.device)
        roots = tokens_of_rows.flatten()[at + 1]
        found = self._rank(hidden.flatten(0, 1)[at], roots, np.concatenate(wanted))
        ends = np.cumsum([counted.total for counted in answers])[:-1]
        parts = zip(*(np.split(table, ends) for table in found), strict=True)
        before_loops = iter([counted.before_loop for counted in answers])
        return [
            [
                self._continuation(text, answer, next(before_loops), *next(parts))
                for answer in text.answers
            ]
            for text in texts
        ]

    def _continuation(
        self,
        text: Text,
        answer: Answer,
        num_before_loop: int,
        ranks: Ranks,
        guesses: NDArray[np.int32],
        probability: NDArray[np.float32],
    ) -> Continuation:
        guessed = None
        if self._num_guesses:
            tokens = np.array(text.token_ids[: answer.stop], dtype=np.int64)
            guessed = Guessed(tokens, answer.start, answer.has_ended, guesses, probability)
        return Continuation(
            text.prompt_id, text.temperature, ranks, num_before_loop, guessed, text.category
        )

    def _padded(self, sequences: Sequence[list[int]]) -> Tensor:
        """Return [B, T]; shorter sequences are padded at the end."""
        length = max(map(len, sequences))
        padded = [tokens + [0] * (length - len(tokens)) for tokens in sequences]
        return torch.tensor(padded, device=self._target.weight.device)

    def _rank(
        self, hidden: Tensor, roots: Tensor, wanted: NDArray[np.int64]
    ) -> tuple[Ranks, NDArray[np.int32], NDArray[np.float32]]:
        """Find the ranks of tokens in the heads' logits.

        Args:
            hidden: [P, H] states that the heads guess from.
            roots: [P] the tokens after them.
            wanted: [P, K] the tokens that the heads are to guess; each is the parent of the next.

        Returns:
            [P, K] ranks of the wanted tokens; [P, K, k] guesses and probabilities, as the heads
            have them before a selector.

        """
        device = hidden.device
        labels = torch.from_numpy(wanted).to(device)
        # Where there is no parent there is no label either, and nothing to rank.
        parents = torch.cat((roots[:, None], labels[:, :-1]), dim=1).clamp_(min=0)
        features = self._heads.features(hidden, parents)
        ranks = torch.empty(wanted.shape, dtype=torch.int16, device=device)
        shape = (*wanted.shape, self._num_guesses)
        guesses = torch.empty(shape, dtype=torch.int32, device=device)
        probability = torch.empty(shape, dtype=torch.float32, device=device)
        size = chunk_size(self._target.vocab_size, device)
        selector, scale = self._heads.selector, self._heads.logit_scale
        for chunk in torch.split(torch.arange(len(hidden), device=device), size):
            for head in range(self._heads.num_heads):
                logits = self._heads.logits(features[head, chunk], head)
                if self._num_guesses:
                    scaled = logits.float() * scale
                    best = scaled.topk(self._num_guesses, dim=-1)
                    totals = scaled.logsumexp(dim=-1, keepdim=True)
                    guesses[chunk, head] = best.indices.to(torch.int32)
                    probability[chunk, head] = (best.values - totals).exp()
                if selector is not None:
                    logits = selector.rank_again(logits, parents[chunk, head], head, scale)
                ranks[chunk, head] = rank_of(logits, labels[chunk, head]).to(torch.int16)
        return ranks.cpu().numpy(), guesses.cpu().numpy(), probability.cpu().numpy()

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
    """Return [positions, heads]: the right tokens of the guesses; -1 is none.

    Head k guesses token p + 1 + k at position p. The answer's last token is not among them: the
    step that reaches it emits it, guessed or not, and nothing follows it.
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
        [N] int64, at most `RANK_CAP`, which is also the rank of the label -1 and of a label whose
        logit is minus infinity.
    """
    value = logits.gather(-1, labels.clamp(min=0)[:, None])
    ranks = (logits > value).sum(dim=-1).clamp_(max=RANK_CAP)
    return ranks.masked_fill_((labels < 0) | value[:, 0].isneginf(), RANK_CAP)
