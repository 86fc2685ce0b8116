"""The target model for the tools: its sizes and its lm_head."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_medusa.errors import UserError
from vllm_medusa.heads.io.files import TensorStore, open_store, read_json
from vllm_medusa.heads.io.formats import EMBEDDING, PREFIXES
from vllm_medusa.heads.io.resolve import resolve

_LM_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_layer)\.(weight|bias)$")


@dataclass(frozen=True)
class Target:
    """A target model.

    Attributes:
        name: as the user wrote it.
        revision: of a hub name.
        hidden_size: of its final hidden states.
        vocab_size: rows of its lm_head.
        is_tied: whether its lm_head is its input embedding; None if config.json does not say.
        end_tokens: tokens that end its answers, from generation_config.json, or else config.json.
    """

    name: str
    revision: str | None
    hidden_size: int
    vocab_size: int
    is_tied: bool | None
    end_tokens: frozenset[int]


def read_target(name: str, *, revision: str | None = None) -> Target:
    """Read the sizes of a target model; for a hub name download only the JSON files.

    Raises:
        UserError: no such model, or not a causal language model.
    """
    location = resolve(name, "model", None, revision=revision)
    config_path = location / "config.json"
    if not config_path.is_file():
        raise UserError(f"{location}: no config.json, so no model; name the target's directory")
    config = read_json(config_path)
    text = config.get("text_config", config)
    sizes = [
        next((text[key] for key in keys if isinstance(text.get(key), int)), None)
        for keys in (("hidden_size", "n_embd", "d_model"), ("vocab_size",))
    ]
    if sizes[0] is None or sizes[1] is None:
        raise UserError(f"{config_path}: gives no hidden_size and vocab_size; name a causal model")
    return Target(
        name=name,
        revision=revision,
        hidden_size=sizes[0],
        vocab_size=sizes[1],
        is_tied=text.get("tie_word_embeddings", config.get("tie_word_embeddings")),
        end_tokens=_end_tokens(location, text.get("eos_token_id", config.get("eos_token_id"))),
    )


def _end_tokens(location: Path, of_config: object) -> frozenset[int]:
    path = location / "generation_config.json"
    end = (read_json(path) if path.is_file() else {}).get("eos_token_id", of_config)
    tokens = end if isinstance(end, list) else [end]
    return frozenset(token for token in tokens if isinstance(token, int))


def read_lm_head(target: Target) -> torch.Tensor:
    """Read the target's lm_head, or its input embedding if they are tied: [V, H].

    Raises:
        UserError: none or several candidates, or one with a bias, which no head format holds.
    """
    location = resolve(target.name, "model", _select_lm_head, revision=target.revision)
    store = open_store(location, _select_lm_head)
    candidates = _select_lm_head(store.keys)
    embeddings = [key for key in candidates if EMBEDDING.search(key)]
    found = [key for key in candidates if key not in embeddings]
    if any(key.endswith(".bias") for key in found):
        raise UserError(
            f"{location}: the lm_head has a bias, which heads' lm_heads cannot have; use "
            "the heads with vllm_medusa, which shares the target's lm_head"
        )
    if target.is_tied or (not found and target.is_tied is None):
        found = embeddings
    if len(found) != 1:
        raise UserError(
            f"{location}: found {len(found)} tensors that may be the lm_head "
            f"({', '.join(found[:3]) or 'none'}); name a model with one lm_head"
        )
    return _checked(store, found[0], target)


def _checked(store: TensorStore, key: str, target: Target) -> torch.Tensor:
    weight = store.read(key)
    expected = [target.vocab_size, target.hidden_size]
    if list(weight.shape) != expected or not weight.is_floating_point():
        raise UserError(
            f"{store.file_of(key)}: tensor {key!r} is {weight.dtype} of shape "
            f"{list(weight.shape)}, expected floating point of shape {expected}; name a model that "
            "is not quantised"
        )
    return weight


def _select_lm_head(keys: Iterable[str]) -> Collection[str]:
    """The names that may be the lm_head: itself, its bias, the input embedding."""
    return [
        key
        for key in keys
        if not key.startswith(PREFIXES) and (_LM_HEAD.search(key) or EMBEDDING.search(key))
    ]
