"""The target model for `distill`: tokenizer, chat template, context, fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_medusa.data.prompts import Turn
from vllm_medusa.errors import UserError
from vllm_medusa.heads.io.files import read_json
from vllm_medusa.heads.io.resolve import resolve
from vllm_medusa.target.config import read_target
from vllm_medusa.target.settings import AnswerSettings

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_FINGERPRINTED = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.bin", "*.pt")
_SAMPLE_BYTES = 1 << 16


class TemplateError(Exception):
    """The chat template refuses a conversation."""


@dataclass(frozen=True)
class AnsweringModel:
    """The target model's tokenizer, chat template and limits.

    Attributes:
        tokenizer: of `transformers`.
        vocab_size: rows of its lm_head.
        max_model_len: tokens of the longest sequence.
        max_prompt_tokens: of the longest prompt that leaves room for an answer.
        fingerprint: hash of a sample of its files; of a hub model its commit.
    """

    tokenizer: Any
    vocab_size: int
    max_model_len: int
    max_prompt_tokens: int
    fingerprint: str

    def tokens_of_text(self, text: str) -> list[int]:
        """Tokenize a text prompt as vLLM's completions do, special tokens added."""
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def tokens_of_chat(self, turns: list[Turn]) -> list[int]:
        """Tokenize a conversation as vLLM's chat does, up to where the next answer starts.

        Raises:
            TemplateError: the chat template refuses it.
        """
        text = chat_text(self.tokenizer, turns)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def text_of(self, token_ids: list[int]) -> str:
        """Return an answer's text as vLLM's chat gives it, without special tokens."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


def chat_text(tokenizer: Any, turns: Sequence[Turn]) -> str:
    """Render a conversation by the chat template, up to where the next answer starts.

    Raises:
        TemplateError: the chat template refuses it.
    """
    from jinja2 import TemplateError as JinjaError

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except JinjaError as exc:
        raise TemplateError(f"the chat template refuses it ({exc})") from None


def load_answering_model(settings: AnswerSettings) -> AnsweringModel:
    """Read everything of the target model except its weights.

    Raises:
        UserError: no such model, no tokenizer, one that does not fit, or a context that is too
            short for the settings.
    """
    target = read_target(settings.model, revision=settings.revision)
    location = resolve(settings.model, "model", None, revision=settings.revision)
    tokenizer = load_tokenizer(settings.model, settings.revision, settings.llm_options)
    if tokenizer.vocab_size > target.vocab_size:
        raise UserError(
            f"the tokenizer of {settings.model} has {tokenizer.vocab_size} tokens, the model "
            f"{target.vocab_size}: it belongs to another model"
        )
    max_model_len = _max_model_len(settings, location, tokenizer)
    room = max_model_len - settings.max_tokens
    max_prompt_tokens = room if settings.max_prompt_tokens is None else settings.max_prompt_tokens
    if not 1 <= max_prompt_tokens <= room:
        prompts = settings.max_prompt_tokens or 1
        raise UserError(
            f"prompts of {prompts} tokens (--max-prompt-tokens) and answers of "
            f"{settings.max_tokens} (--max-tokens) exceed the context of {settings.model}, "
            f"{max_model_len} tokens; lower one of them"
        )
    is_hub_name = not Path(settings.model).expanduser().exists()
    return AnsweringModel(
        tokenizer=tokenizer,
        vocab_size=target.vocab_size,
        max_model_len=max_model_len,
        max_prompt_tokens=max_prompt_tokens,
        fingerprint=location.name if is_hub_name else _fingerprint(location),
    )


def load_tokenizer(model: str, revision: str | None, llm_options: Mapping[str, Any]) -> Any:
    """Load the tokenizer that vLLM would use.

    Args:
        model: directory or hub name.
        revision: of a hub name.
        llm_options: arguments of ``vllm.LLM``, which can name another tokenizer.

    Raises:
        UserError: no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    name = llm_options.get("tokenizer") or model
    try:
        return AutoTokenizer.from_pretrained(
            name,
            revision=llm_options.get("tokenizer_revision", revision),
            trust_remote_code=bool(llm_options.get("trust_remote_code", False)),
        )
    except Exception as exc:  # the library raises any error of its file readers
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise UserError(
            f"{name}: no tokenizer that can be loaded ({reason}); give a model with its tokenizer"
        ) from None


def _max_model_len(settings: AnswerSettings, location: Path, tokenizer: Any) -> int:
    given = settings.llm_options.get("max_model_len")
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise UserError(f"--llm-options: max_model_len is {given!r}; give a positive integer")
        return given
    config = read_json(location / "config.json")
    text = config.get("text_config", config)
    lengths = [text[key] for key in _CONTEXT_KEYS if isinstance(text.get(key), int)]
    if not lengths:
        raise UserError(
            f"{location / 'config.json'}: gives no length of the context; set one with "
            """--llm-options '{"max_model_len": N}'"""
        )
    return int(min(*lengths, tokenizer.model_max_length))


def _fingerprint(directory: Path) -> str:
    """Hash the names, sizes and a few blocks of the model's files, so that other weights differ."""
    digest = hashlib.sha256()
    paths = {path for pattern in _FINGERPRINTED for path in directory.glob(pattern)}
    for path in sorted(paths):
        size = path.stat().st_size
        digest.update(f"{path.name}\n{size}\n".encode())
        with open(path, "rb") as file:
            for start in sorted({0, size // 2, max(0, size - _SAMPLE_BYTES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
