"""The texts that acceptance is measured on, and which positions of them count.

docs/acceptance.md explains the rule.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from vllm_medusa.data.rows import Row

#: A text loops from the first run of this many tokens that stood in it before.
LOOP_TOKENS = 16


@dataclass(frozen=True)
class Answer:
    """The place of an answer in a text.

    Attributes:
        start, stop: its tokens are [start, stop) of the text's; start is at least 1.
        has_ended: whether the target ended it by itself; if not, a limit of tokens cut it.

    """

    start: int
    stop: int
    has_ended: bool


@dataclass(frozen=True)
class Text:
    """Prompts and the target's answers to them.

    Attributes:
        prompt_id: of the first prompt.
        temperature: of the answers; 0 is greedy.
        token_ids: all tokens.
        answers: which of them the target wrote.
        category: of the prompt, if it has one.

    """

    prompt_id: str
    temperature: float
    token_ids: list[int]
    answers: Sequence[Answer]
    category: str | None = None

    def tokens_of(self, answer: Answer) -> list[int]:
        """Return an answer's tokens."""
        return self.token_ids[answer.start : answer.stop]


@dataclass(frozen=True)
class Counted:
    """How many positions of an answer count.

    Attributes:
        total: number of positions that count; they are the first ones.
        before_loop: number of these before the answer begins to loop.

    """

    total: int
    before_loop: int


def text_of_row(row: Row, end_tokens: Collection[int], temperature: float = 0.0) -> Text:
    """Return a row as a text.

    Rows do not say why an answer stopped. It has ended if its last token is one of ``end_tokens``
    (`Target.end_tokens`); if not, it counts as cut.
    """
    tokens: list[int] = row.token_ids.tolist()
    answers = [Answer(start, stop, tokens[stop - 1] in end_tokens) for start, stop in row.answers()]
    return Text(row.id, temperature, tokens, answers, row.category)


def counted_positions(tokens: Sequence[int], has_ended: bool, num_heads: int) -> Counted:
    """Return which positions of an answer count.

    A step begins at position p if its root is token p; it emits token p + 1 at least and token p +
    num_heads + 1 at most. If the target ended the answer, a step can begin at every token except
    the last. If the answer was cut, only the steps that cannot reach the cut count, because it is
    unknown how far the others would go. Text before a loop counts as if it were cut there.

    Args:
        tokens: of the answer.
        has_ended: whether the target ended it.
        num_heads: of the heads.

    """
    before_cut = len(tokens) - num_heads - 1
    total = max(0, len(tokens) - 1 if has_ended else before_cut)
    loop = loop_start(tokens)
    if loop == len(tokens):
        return Counted(total, total)
    return Counted(total, max(0, loop - num_heads - 1))


def loop_start(tokens: Sequence[int]) -> int:
    """Return the index at which a text begins to loop; its length if it does not.

    The loop begins with the first `LOOP_TOKENS` tokens in a row that stood earlier in the text; the
    two runs can overlap.
    """
    seen: set[tuple[int, ...]] = set()
    for start in range(len(tokens) - LOOP_TOKENS + 1):
        run = tuple(tokens[start : start + LOOP_TOKENS])
        if run in seen:
            return start
        seen.add(run)
    return len(tokens)
