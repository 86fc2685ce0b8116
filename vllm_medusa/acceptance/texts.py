"""The texts that acceptance is measured on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A prompt and the target's continuation of it.

    Attributes:
        prompt_id: of the prompt.
        temperature: of the continuation; 0 is greedy.
        token_ids: the prompt's tokens and the continuation's.
        num_prompt_tokens: how many of them are the prompt's.
        has_ended: whether the target ended it, or the limit of tokens did.

    """

    prompt_id: str
    temperature: float
    token_ids: list[int]
    num_prompt_tokens: int
    has_ended: bool

    @property
    def continuation(self) -> list[int]:
        """The target's tokens."""
        return self.token_ids[self.num_prompt_tokens :]
