"""Simulates what the engine would accept, by walking along known texts.

Greedy text is the same whatever is drafted, so this is exact: a step emits the accepted nodes and
one more token, and the next step begins after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from vllm_medusa.draft.drafter import Drafter
from vllm_medusa.draft.types import Draft, Floats, Ints, Request

#: From [B, K, k] guesses, their probabilities and the roots [B] it makes the tables of a drafter
#: whose guesses depend on the parent.
Tables: TypeAlias = Callable[[Ints, Floats, Ints], tuple[Ints, Floats]]


@dataclass(frozen=True)
class GuessedText:
    """A prompt, the target's continuation of it, and what the heads guess along it.

    Attributes:
        tokens: [L] of the prompt and the continuation.
        num_prompt_tokens: number of prompt tokens.
        guessed_tokens: [P, K, k] at each position, where position p's root is token p of the
            continuation; the likeliest first.
        guessed_probability: [P, K, k] that the heads give them.
        num_positions: steps begin at positions below it; at most P. Tokens that such a step accepts
            after it count, so the text should be longer by the longest draft.

    """

    tokens: NDArray[np.int64]
    num_prompt_tokens: int
    guessed_tokens: NDArray[np.int64]
    guessed_probability: NDArray[np.float64]
    num_positions: int


@dataclass
class Replayed:
    """What happened in a replay.

    Attributes:
        num_tokens: emitted.
        num_requests: in all steps together: steps of single requests.
        steps: of each step, its requests, nodes, nodes that fork, and whether the heads ran.

    """

    num_tokens: int = 0
    num_requests: int = 0
    steps: list[tuple[int, int, int, bool]] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a request's step emits; 1 without any."""
        return self.num_tokens / self.num_requests if self.num_requests else 1.0


def replay(
    texts: Sequence[GuessedText],
    drafter: Drafter,
    batch_size: int = 32,
    tables: Tables | None = None,
    step_ms: Callable[[int, int, int], float] | None = None,
) -> Replayed:
    """Draft along texts, ``batch_size`` of them at a time, each as a request.

    ``tables`` makes the drafter's tables from the texts' guesses. ``step_ms`` tells what a step
    takes by its requests, nodes and forks; None: the drafter learns no times.
    """
    result = Replayed()
    waiting = [index for index, text in enumerate(texts) if text.num_positions > 0][::-1]
    position: dict[int, int] = {}
    took_ms: float | None = None
    while waiting or position:
        while waiting and len(position) < batch_size:
            position[waiting.pop()] = 0
            took_ms = None
        running = list(position)
        requests = [_request(index, texts[index], position[index]) for index in running]
        guessed = None
        drafter.may_fork(len(running))
        if runs_heads := drafter.levels(len(running)) > 0:
            at = [(texts[index], position[index]) for index in running]
            guessed = (
                np.stack([text.guessed_tokens[place] for text, place in at]),
                np.stack([text.guessed_probability[place] for text, place in at]),
            )
            if tables is not None:
                guessed = tables(*guessed, np.array([request.tokens[-1] for request in requests]))
        drafts = drafter.propose(requests, guessed, took_ms)
        num_forks = 0
        for index, draft in zip(running, drafts, strict=True):
            text = texts[index]
            root = text.num_prompt_tokens + position[index]
            emitted = 1 + num_accepted(draft, text.tokens[root + 1 :])
            num_forks += len(draft) - len(set(draft.parents.tolist()))
            result.num_tokens += emitted
            position[index] += emitted
            if position[index] >= text.num_positions:
                del position[index]
                drafter.finish(str(index))
        if step_ms is not None:
            took_ms = step_ms(len(running), len(drafts.tokens), num_forks)
        if len(position) < len(running):
            took_ms = None
        result.num_requests += len(running)
        result.steps.append((len(running), len(drafts.tokens), num_forks, runs_heads))
    return result


def num_accepted(draft: Draft, following: NDArray[np.int64]) -> int:
    """Return how many nodes of a draft the text after its root goes through."""
    nodes = {
        (parent, token): node
        for node, (parent, token) in enumerate(
            zip(draft.parents.tolist(), draft.tokens.tolist(), strict=True), start=1
        )
    }
    node, count = 0, 0
    for token in following.tolist():
        if (node, token) not in nodes:
            break
        node, count = nodes[node, token], count + 1
    return count


def _request(index: int, text: GuessedText, position: int) -> Request:
    stop = text.num_prompt_tokens + position + 1
    return Request(str(index), text.tokens[:stop], text.num_prompt_tokens)
