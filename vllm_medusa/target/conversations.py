"""From prompts to rows: every turn answered after the answers before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vllm_medusa.data.prompts import Prompt, Turn
from vllm_medusa.data.rows import Row
from vllm_medusa.errors import UserError
from vllm_medusa.target.settings import answer_seed
from vllm_medusa.target.text import AnsweringModel, TemplateError

#: Answers to lists of token ids, with the seed of each: the answers' token ids, in order.
Generate = Callable[[list[list[int]], list[int]], list[list[int]]]


class _Conversation:
    """A prompt while it is answered."""

    def __init__(self, prompt: Prompt, model: AnsweringModel) -> None:
        self.prompt = prompt
        self.num_answers = 0
        self._model = model
        self._waiting = asked_turns(prompt)
        self._said: list[Turn] = []
        self._rows: list[tuple[str, list[int], list[bool]]] = []

    def next_request(self) -> list[int] | None:
        """All tokens before the next answer; None if no answer is missing or there is no room."""
        if self.prompt.text is not None:
            return None if self.num_answers else self._model.tokens_of_text(self.prompt.text)
        while self._waiting:
            self._said.append(self._waiting.pop(0))
            if self._said[-1].role == "user":
                try:
                    request = self._model.tokens_of_chat(self._said)
                except TemplateError as exc:
                    raise UserError(f"prompt {self.prompt.id!r}: {exc}") from None
                return request if len(request) <= self._model.max_prompt_tokens else None
        return None

    def add(self, request: list[int], answer: list[int]) -> None:
        """Add an answer to the last request."""
        self.num_answers += 1
        self._said.append(Turn("assistant", self._model.text_of(answer)))
        if not self._rows or self._rows[-1][1] != request[: len(self._rows[-1][1])]:
            suffix = f"#{self.num_answers}" if self._rows else ""
            self._rows.append((self.prompt.id + suffix, [], []))
        _, token_ids, loss_mask = self._rows[-1]
        loss_mask += [False] * (len(request) - len(token_ids)) + [True] * len(answer)
        token_ids += request[len(token_ids) :] + answer

    def rows(self) -> list[Row]:
        return [
            Row(
                identity,
                np.array(token_ids, np.int32),
                np.array(loss_mask, np.bool_),
                self.prompt.category,
            )
            for identity, token_ids, loss_mask in self._rows
        ]


def asked_turns(prompt: Prompt) -> list[Turn]:
    """Return the turns that the target gets: its own answers replace those of the file."""
    return [turn for turn in prompt.turns if turn.role != "assistant"]


def first_request(prompt: Prompt, model: AnsweringModel) -> list[int]:
    """Return the tokens before a prompt's first answer.

    Raises:
        TemplateError: the chat template refuses the conversation, at any of its turns.
    """
    if prompt.text is not None:
        return model.tokens_of_text(prompt.text)
    said: list[Turn] = []
    first: list[int] | None = None
    for turn in asked_turns(prompt):
        said.append(turn)
        if turn.role == "user":
            request = model.tokens_of_chat(said)
            first = request if first is None else first
            said.append(Turn("assistant", "an answer"))
    assert first is not None
    return first


def answer_prompts(
    prompts: Sequence[Prompt], model: AnsweringModel, generate: Generate, seed: int
) -> list[Row]:
    """Answer prompts turn by turn, all conversations' first turns at once, then all second ones.

    A conversation is one row if its tokens before each answer begin with the row so far. If they do
    not (a chat template that removes thinking or trims answers, a sample that the tokenizer would
    split into other tokens), the later answer begins a new row, `ID#TURN`. So each answer in a row
    follows exactly the tokens that a server would have given the model. A conversation ends early
    if the next turn leaves no room for an answer.

    Args:
        prompts: to answer.
        model: the model that answers.
        generate: answers a batch.
        seed: seed of the samples.

    Returns:
        The rows, in the order of the prompts.
    """
    conversations = [_Conversation(prompt, model) for prompt in prompts]
    active = conversations
    while active:
        asked = [
            (conversation, request)
            for conversation in active
            if (request := conversation.next_request()) is not None
        ]
        if not asked:
            break
        seeds = [
            answer_seed(seed, conversation.prompt.id, conversation.num_answers)
            for conversation, _ in asked
        ]
        answers = generate([request for _, request in asked], seeds)
        for (conversation, request), answer in zip(asked, answers, strict=True):
            conversation.add(request, answer)
        active = [conversation for conversation, _ in asked]
    return [row for conversation in conversations for row in conversation.rows()]
