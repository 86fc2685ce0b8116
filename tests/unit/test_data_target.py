"""What `distill` knows of the target model before an engine is up."""

import json
import shutil
from pathlib import Path

import pytest

from vllm_medusa.data.prompts import Turn
from vllm_medusa.target.settings import AnswerSettings
from vllm_medusa.target.text import TemplateError, load_answering_model

DEMO_MODEL = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO_MODEL, tmp_path / "model")


def fingerprint(directory: Path) -> str:
    return load_answering_model(AnswerSettings(model=str(directory))).fingerprint


def test_fingerprint_is_of_the_content(directory: Path) -> None:
    before = fingerprint(directory)
    assert fingerprint(DEMO_MODEL) == before
    assert fingerprint(directory.rename(directory.with_name("moved"))) == before


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_fingerprint_changes_with_the_weights(directory: Path, place: float) -> None:
    before = fingerprint(directory)
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    start = max(4000, int(place * (len(data) - 100)))
    data[start : start + 100] = bytes(byte ^ 1 for byte in data[start : start + 100])
    weights.write_bytes(data)
    assert fingerprint(directory) != before


def test_fingerprint_changes_with_the_chat_template(directory: Path) -> None:
    before = fingerprint(directory)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint(directory) != before


def test_context_is_the_shortest_of_what_is_said(directory: Path) -> None:
    def limits(**options: int) -> tuple[int, int]:
        model = load_answering_model(
            AnswerSettings(model=str(directory), max_tokens=100, llm_options=options)
        )
        return model.max_model_len, model.max_prompt_tokens

    assert limits() == (2048, 1948)
    assert limits(max_model_len=512) == (512, 412)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 1024}))
    assert limits() == (1024, 924)


def test_chat_goes_through_the_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this') }}"
        "{% endif %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    model = load_answering_model(AnswerSettings(model=str(directory)))
    turns = [Turn("user", "x"), Turn("assistant", "y"), Turn("user", "z")]
    text = "[user] x\n[assistant] y\n[user] z\n[assistant]"
    token_ids = model.tokens_of_chat(turns)
    assert token_ids == model.tokens_of_text(text)
    assert model.text_of([*token_ids, 0]) == text
    with pytest.raises(TemplateError, match=r"the chat template refuses it \(not this\)"):
        model.tokens_of_chat([Turn("user", "no")])
