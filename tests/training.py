"""Small models, rows and settings for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_medusa.data.rows import Row, write_shard
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.settings import TrainSettings

VOCAB_SIZE = 50
HIDDEN_SIZE = 32


def make_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama in float32 whose positions, attention and MLPs all matter."""
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": False,
            "eos_token_id": None,
            "bos_token_id": None,
            **changes,
        }
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


def make_target(**changes: Any) -> FrozenTarget:
    return FrozenTarget(make_llama(**changes))


def save_llama(path: Path, **changes: Any) -> Path:
    make_llama(**changes).save_pretrained(path)
    return path


def make_settings(**changes: Any) -> TrainSettings:
    length = {} if "epochs" in changes else {"steps": 6}
    defaults = {
        "model": "m",
        "data": "d",
        "num_heads": 3,
        "dtype": "float32",
        "batch_tokens": 96,
        "lr": 1e-2,
        "eval_every": 3,
        "held_out": 0.1,
    }
    return TrainSettings(**{**defaults, **length, **changes})


def document(tokens: list[int], is_answer: list[bool] | list[int]) -> Row:
    return Row("", np.array(tokens, dtype=np.int32), np.array(is_answer, dtype=np.bool_))


def random_documents(count: int, seed: int = 0, longest: int = 30) -> list[Row]:
    """Documents with one answer or two, some of them with no prompt."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        length = int(rng.integers(6, longest + 1))
        mask = np.arange(length) >= rng.integers(0, 5)
        if length > 15:
            mask[8:11] = False
        result.append(document(rng.integers(0, VOCAB_SIZE, length).tolist(), mask.tolist()))
    return result


def counting_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows that count upwards by ones or twos: heads can learn them from the hidden states."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = int(rng.integers(10, 31))
        stride = int(rng.integers(1, 3))
        tokens = (rng.integers(VOCAB_SIZE) + stride * np.arange(length)) % VOCAB_SIZE
        rows.append(Row(f"row {index}", tokens.astype(np.int32), np.arange(length) >= 4))
    return rows


def write_rows(directory: Path, rows: list[Row], per_shard: int = 16) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(rows), per_shard):
        path = directory / f"part-{start // per_shard:05d}.jsonl"
        write_shard(path, rows[start : start + per_shard])
    return directory
