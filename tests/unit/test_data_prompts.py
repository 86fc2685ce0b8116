"""Prompt files: each form is read, and each fault is named with its line."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from vllm_medusa.data.prompts import Prompt, Turn, parse_prompts, read_prompts
from vllm_medusa.errors import UserError

DEMO_PROMPTS = Path(__file__).parents[2] / "demo" / "prompts.jsonl"
GOOD = b'{"prompt": "a"}'


def write(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in encoded))
    return path


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ({"prompt": "def f("}, Prompt("line-1", 1, "def f(")),
        ({"text": "é", "id": "x", "source": 3}, Prompt("x", 1, "é")),
        ({"text": "a", "prompt": None}, Prompt("line-1", 1, "a")),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
            Prompt("line-1", 1, turns=(Turn("system", "s"), Turn("user", "u"))),
        ),
        (
            {
                "id": "QWJ_0",
                "conversations": [
                    {"from": "human", "value": "u"},
                    {"from": "gpt", "value": "a"},
                    {"from": "human", "value": "v"},
                    {"from": "gpt", "value": ""},
                ],
            },
            Prompt(
                "QWJ_0",
                1,
                turns=(
                    Turn("user", "u"),
                    Turn("assistant", "a"),
                    Turn("user", "v"),
                    Turn("assistant", ""),
                ),
            ),
        ),
        (
            {"question_id": 81, "category": "writing", "turns": ["one", "two"]},
            Prompt("81", 1, turns=(Turn("user", "one"), Turn("user", "two")), category="writing"),
        ),
    ],
)
def test_form_is_read(tmp_path: Path, line: dict[str, Any], prompt: Prompt) -> None:
    assert read_prompts(write(tmp_path / "p", line)) == [prompt]
    assert Prompt.from_record(json.loads(json.dumps(prompt.as_record()))) == prompt


def test_lines_may_end_as_windows_ends_them_and_the_last_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}')
    assert [prompt.text for prompt in read_prompts(path)] == ["a", "b"]


def test_demo_prompts() -> None:
    prompts = read_prompts(DEMO_PROMPTS)
    assert len({prompt.id for prompt in prompts}) == len(prompts) == 48


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "empty"),
        (b"  \t", "empty"),
        (b'{"prompt": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'[{"prompt": "a"}]', "a JSON list, not an object"),
        (b'"a"', "a JSON str, not an object"),
        ({"question": "a"}, "one of the keys prompt, text, messages, conversations, turns wanted"),
        ({"prompt": "a", "messages": []}, "found 'prompt' and 'messages'"),
        ({"prompt": ""}, "prompt is an empty text"),
        ({"prompt": 3}, "prompt is not a text"),
        (b'{"text": "\\ud83d"}', "half a surrogate pair"),
        ({"messages": "hello"}, "messages is not a list"),
        ({"messages": []}, "no user's turn"),
        ({"messages": ["hello"]}, "a message is not an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role 'tool' is none of"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "is none of"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content is not a text"),
        ({"messages": [{"role": "user"}]}, "content is not a text"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "no user's turn"),
        (
            {"messages": [{"role": r, "content": "x"} for r in ("user", "system")]},
            "a system message that is not the first",
        ),
        ({"turns": []}, "no user's turn"),
        ({"turns": ["a", ""]}, "a turn is an empty text"),
        ({"prompt": "b", "id": "line-1"}, "id 'line-1' is already the id of line 1"),
        ({"prompt": "b", "id": 1.5}, "id is 1.5"),
        ({"prompt": "b", "id": ""}, "id is an empty text"),
    ],
)
def test_bad_line_is_an_error_or_left_out(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    line: bytes | dict[str, Any],
    reason: str,
) -> None:
    path = write(tmp_path / "p", GOOD, line, b'{"text": "c"}')
    with pytest.raises(UserError) as error:
        read_prompts(path)
    message = str(error.value)
    assert message.startswith(f"{path}: line 2: ")
    assert reason in message
    assert "--on-bad skip" in message
    assert "\n" not in message
    with caplog.at_level(logging.WARNING):
        prompts = read_prompts(path, on_bad="skip")
    assert [(prompt.line, prompt.text) for prompt in prompts] == [(1, "a"), (3, "c")]
    assert [record.getMessage()[: len(str(path)) + 8] for record in caplog.records] == [
        f"{path}: line 2"
    ]


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "p", GOOD, *[b""] * 9)
    assert [bad.line for bad in parse_prompts(path)[1]] == list(range(2, 11))
    with pytest.raises(UserError, match=r"line 2: empty; .*line 6: empty; and 4 more; "):
        read_prompts(path)


def test_no_prompt_is_an_error_either_way(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable prompt"):
        read_prompts(write(tmp_path / "empty"))
    with pytest.raises(UserError, match="no usable prompt"):
        read_prompts(write(tmp_path / "bad", b"{"), on_bad="skip")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory; give a JSONL file"):
        read_prompts(tmp_path / "absent")
    with pytest.raises(UserError, match="Is a directory"):
        read_prompts(tmp_path)
