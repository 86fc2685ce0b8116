"""The prompts of a comparison: a file's, vLLM-like random ones, or a small built-in set."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vllm_medusa.data.prompts import Prompt, Turn, read_prompts
from vllm_medusa.errors import UserError
from vllm_medusa.target.text import TemplateError, chat_text

BUILT_IN, RANDOM = "builtin", "random"
#: How many prompts the random set has.
NUM_RANDOM = 256


@dataclass(frozen=True)
class BenchPrompt:
    """A prompt for all engines of a comparison.

    Attributes:
        id: unique among the prompts.
        category: of the file; None if it names none.
        token_ids: the prompt, with the tokenizer's special tokens.
        text: the prompt as text, without those; None for random tokens.
    """

    id: str
    category: str | None
    token_ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True)
class PromptSet:
    """All prompts of a comparison, categories taking turns.

    Attributes:
        source: file, ``builtin`` or ``random``.
        prompts: at least one.
        notes: sentences about them for the report.
    """

    source: str
    prompts: tuple[BenchPrompt, ...]
    notes: tuple[str, ...] = ()

    def batch(self, number: int, size: int) -> list[BenchPrompt]:
        """The prompts of round ``number`` (from 1): the next ``size``, from the start again."""
        start = (number - 1) * size
        return [self.prompts[(start + i) % len(self.prompts)] for i in range(size)]


def load_prompts(source: str, tokenizer: Any, *, random_len: int, seed: int) -> PromptSet:
    """Read and tokenise prompts.

    A conversation is rendered by the model's chat template: completely if it alternates and ends
    with the user, else up to the end of the user's first turn (the second turn of MT-Bench and
    ShareGPT would need the model's own answer before it).

    Args:
        source: a path, ``builtin`` or ``random``.
        tokenizer: of the target model (transformers).
        random_len: tokens of a random prompt.
        seed: of the random prompts.

    Raises:
        UserError: an unusable file, or prompts without tokens.
    """
    if source == RANDOM:
        return _random_prompts(tokenizer, random_len, seed)
    path = Path(__file__).with_name("builtin_prompts.jsonl") if source == BUILT_IN else source
    prompts, notes = [], []
    if tokenizer.chat_template is None:
        notes.append(
            "The model has no chat template: of a conversation the prompt is the text of the last "
            "user turn."
        )
    has_chats = False
    for prompt in read_prompts(path):
        has_chats |= prompt.text is None
        text, token_ids = _tokenise(prompt, tokenizer)
        if not token_ids:
            raise UserError(f"{path}: prompt {prompt.id!r} has no tokens; take it out")
        prompts.append(BenchPrompt(prompt.id, prompt.category, tuple(token_ids), text))
    return PromptSet(source, tuple(_take_turns(prompts)), tuple(notes) if has_chats else ())


def _tokenise(prompt: Prompt, tokenizer: Any) -> tuple[str, list[int]]:
    if prompt.text is not None:
        return prompt.text, tokenizer(prompt.text, verbose=False)["input_ids"]
    turns = conversation_to_answer(prompt.turns)
    if tokenizer.chat_template is None:
        text = turns[-1].content
        return text, tokenizer(text, verbose=False)["input_ids"]
    try:
        text = chat_text(tokenizer, turns)
    except TemplateError as exc:
        raise UserError(f"prompt {prompt.id!r}: {exc}") from None
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    # A server adds the beginning-of-text token, so it must not be in the text already.
    return text.removeprefix(tokenizer.bos_token or ""), token_ids


def conversation_to_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
    """Cut a conversation after the user's turn that the model has to answer."""
    roles = [turn.role for turn in turns if turn.role != "system"]
    alternates = all(role == ("user", "assistant")[index % 2] for index, role in enumerate(roles))
    if alternates and roles[-1] == "user":
        return turns
    first = next(index for index, turn in enumerate(turns) if turn.role == "user")
    return [*(turn for turn in turns[:first] if turn.role == "system"), turns[first]]


def _take_turns(prompts: Sequence[BenchPrompt]) -> list[BenchPrompt]:
    """First of each category, then second of each, ...: a few rounds have all categories."""
    by_category = defaultdict(list)
    for prompt in prompts:
        by_category[prompt.category].append(prompt)
    rows = zip_longest(*by_category.values())
    return [prompt for row in rows for prompt in row if prompt is not None]


def _random_prompts(tokenizer: Any, length: int, seed: int) -> PromptSet:
    special = set(tokenizer.all_special_ids)
    usable = [token for token in range(len(tokenizer)) if token not in special]
    rng = random.Random(seed)
    prompts = tuple(
        BenchPrompt(f"random-{index}", None, tuple(rng.choices(usable, k=length)), None)
        for index in range(NUM_RANDOM)
    )
    note = (
        f"Random prompts: {length} tokens each, drawn evenly from the vocabulary (seed {seed}), as "
        "vLLM's random set is. Acceptance on such text says little about real text."
    )
    return PromptSet(RANDOM, prompts, (note,))
