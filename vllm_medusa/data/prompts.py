"""Prompt files: JSON lines of texts, chats, ShareGPT conversations or MT-Bench questions."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_medusa.errors import UserError

OnBad = Literal["error", "skip"]
Role = Literal["system", "user", "assistant"]

_logger = logging.getLogger(__name__)

#: The keys that say what a line is; a line has exactly one of them.
_KINDS = ("prompt", "text", "messages", "conversations", "turns")
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}
_NUM_NAMED_LINES = 5


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Prompt:
    """A prompt: either a text that is continued as it is, or a conversation.

    Attributes:
        id: the line's own `id` or `question_id`, else `line-N`; unique in its file.
        line: number of its line, from 1.
        text: the text; None for a conversation.
        turns: the conversation as the file has it, assistant's turns included; empty for a text.
        category: of its line, if it has one.
    """

    id: str
    line: int
    text: str | None = None
    turns: tuple[Turn, ...] = ()
    category: str | None = None

    def as_record(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Prompt:
        """Make a prompt from what `as_record` returned."""
        return Prompt(**{**record, "turns": tuple(Turn(**turn) for turn in record["turns"])})


@dataclass(frozen=True)
class BadLine:
    """A line of a prompt file that cannot be used, and why."""

    line: int
    reason: str


class _UnusableError(Exception):
    """The reason why a line cannot be used."""


def read_prompts(path: str | Path, *, on_bad: OnBad = "error") -> list[Prompt]:
    """Read a file of prompts, one JSON object a line.

    A line is `{"prompt": text}` or `{"text": text}`, `{"messages": [{"role", "content"}, ...]}`,
    ShareGPT's `{"conversations": [{"from", "value"}, ...]}`, or MT-Bench's `{"question_id",
    "category", "turns": [text, ...]}`, each with an optional `id` and `category`; other keys are
    ignored.

    Args:
        path: the file.
        on_bad: for lines that are empty, malformed or of another form: an error that names them, or
            leave them out with a warning that names them.

    Raises:
        UserError: no such file, bad lines, or no prompt at all.
    """
    prompts, bad = parse_prompts(path)
    settle_bad_lines(path, bad, on_bad)
    if not prompts:
        raise UserError(f"{path}: no usable prompt in it; give at least one line")
    return prompts


def parse_prompts(path: str | Path) -> tuple[list[Prompt], list[BadLine]]:
    """Read a file of prompts: the usable ones, and the other lines.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as exc:
        raise UserError(f"prompts {str(path)!r}: {exc.strerror}; give a JSONL file") from None
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()  # the text after the last newline is not a line
    prompts: dict[str, Prompt] = {}
    bad = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = _parse_line(line, number)
            if prompt.id in prompts:
                earlier = prompts[prompt.id].line
                raise _UnusableError(f"id {prompt.id!r} is already the id of line {earlier}")
        except _UnusableError as exc:
            bad.append(BadLine(number, str(exc)))
        else:
            prompts[prompt.id] = prompt
    return list(prompts.values()), bad


def settle_bad_lines(path: str | Path, bad: Sequence[BadLine], on_bad: OnBad) -> None:
    """Refuse lines that cannot be used, or warn about them.

    Raises:
        UserError: there are some, and ``on_bad`` does not allow to leave them out.
    """
    if not bad:
        return
    if on_bad == "skip":
        for line in bad:
            _logger.warning("%s: line %d left out: %s", path, line.line, line.reason)
        return
    named = "; ".join(f"line {line.line}: {line.reason}" for line in bad[:_NUM_NAMED_LINES])
    more = len(bad) - _NUM_NAMED_LINES
    raise UserError(
        f"{path}: {named}{f'; and {more} more' if more > 0 else ''}; correct the file, or leave "
        "such lines out with --on-bad skip"
    )


def _parse_line(line: bytes, number: int) -> Prompt:
    if not line.strip():
        raise _UnusableError("empty")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _UnusableError("not UTF-8") from None
    except (ValueError, RecursionError) as exc:
        raise _UnusableError(f"not JSON ({exc})") from None
    if not isinstance(record, dict):
        raise _UnusableError(f"a JSON {type(record).__name__}, not an object")
    present = [key for key in _KINDS if record.get(key) is not None]
    if len(present) != 1:
        found = " and ".join(map(repr, present)) or "none"
        raise _UnusableError(f"one of the keys {', '.join(_KINDS)} wanted, found {found}")
    kind = present[0]
    category = record.get("category")
    return Prompt(
        id=_identity(record, number),
        line=number,
        text=_text(record[kind], kind) if kind in ("prompt", "text") else None,
        turns=() if kind in ("prompt", "text") else _conversation(record[kind], kind),
        category=None if category is None else str(category),
    )


def _identity(record: Mapping[str, Any], number: int) -> str:
    for key in ("id", "question_id"):
        value = record.get(key)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise _UnusableError(f"{key} is {value!r}, not a string or an integer")
            return _text(str(value), key)
    return f"line-{number}"


def _conversation(value: Any, kind: str) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise _UnusableError(f"{kind} is not a list")
    if kind == "turns":
        turns = [Turn("user", _text(text, "a turn")) for text in value]
    else:
        keys = ("role", "content") if kind == "messages" else ("from", "value")
        turns = [_turn(message, *keys) for message in value]
    if any(turn.role == "system" for turn in turns[1:]):
        raise _UnusableError("a system message that is not the first")
    if all(turn.role != "user" for turn in turns):
        raise _UnusableError(f"{kind} holds no user's turn")
    return tuple(turns)


def _turn(message: Any, role_key: str, text_key: str) -> Turn:
    if not isinstance(message, dict):
        raise _UnusableError("a message is not an object")
    name = message.get(role_key)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise _UnusableError(f"{role_key} {name!r} is none of {', '.join(_ROLES)}")
    content = message.get(text_key)
    if role == "assistant" and not content:
        return Turn(role, "")  # for instance a tool call, which needs no answer
    return Turn(role, _text(content, text_key))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _UnusableError(f"{what} is not a text")
    if not value:
        raise _UnusableError(f"{what} is an empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _UnusableError(
            f"{what} holds half a surrogate pair, which no tokenizer reads"
        ) from None
    return value
