"""The prompts of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_medusa.bench.prompts import conversation_to_answer, load_prompts
from vllm_medusa.data.prompts import Turn
from vllm_medusa.errors import UserError

MODEL = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def load(source: str, tokenizer: Any, **options: int) -> Any:
    return load_prompts(source, tokenizer, **{"random_len": 5, "seed": 0, **options})


def test_built_in_prompts_take_turns(tokenizer: Any) -> None:
    prompts = load("builtin", tokenizer)
    assert len(prompts.prompts) == 16
    assert prompts.notes == ()
    categories = ["code", "writing", "reasoning", "extraction"]
    assert [prompt.category for prompt in prompts.prompts] == categories * 4
    for prompt in prompts.prompts:
        assert tokenizer.decode(prompt.token_ids) == prompt.text
    # 16 prompts in batches of 3: round 6 begins with the last one and goes on from the start.
    last = prompts.batch(6, 3)
    assert [prompt.id for prompt in last] == ["extraction-4", "code-1", "writing-1"]
    assert len(prompts.batch(1, 32)) == 32


def test_random_prompts(tokenizer: Any) -> None:
    one, same, other = (load("random", tokenizer, seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one.prompts != other.prompts
    special = set(tokenizer.all_special_ids)
    for prompt in one.prompts:
        assert len(prompt.token_ids) == 5
        assert not special & set(prompt.token_ids)
    assert "Random prompts" in one.notes[0]


def test_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"question_id": 81, "category": "c", "turns": ["One?", "Two?"]}\n')
    (plain,) = load(str(file), tokenizer).prompts
    assert plain.text == "One?"
    assert "no chat template" in load(str(file), tokenizer).notes[0]
    tokenizer.chat_template = "{% for m in messages %}<{{m.role}}>{{m.content}}{% endfor %}<a>"
    try:
        (chat,) = load(str(file), tokenizer).prompts
        assert chat.text == "<user>One?<a>"
        assert tokenizer.decode(chat.token_ids) == chat.text
        assert load(str(file), tokenizer).notes == ()
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("roles", "kept"),
    [
        ("u", "u"),
        ("uu", "u"),
        ("ua", "u"),
        ("uau", "uau"),
        ("suau", "suau"),
        ("suaua", "su"),
        ("au", "u"),
    ],
)
def test_conversations_end_with_a_users_turn(roles: str, kept: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    turns = [Turn(names[role], str(index)) for index, role in enumerate(roles)]  # type: ignore[arg-type]
    assert "".join(turn.role[0] for turn in conversation_to_answer(turns)) == kept


def test_no_such_file(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none"):
        load(str(tmp_path / "none"), tokenizer)
