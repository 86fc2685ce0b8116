"""What decides the rows that `distill` makes, apart from the prompts and the weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_medusa.errors import UserError

#: Arguments of `vllm.LLM` that the caller may not set, and what sets them.
_OWN_OPTIONS = {
    "model": "--model",
    "revision": "--revision",
    "max_num_seqs": "--batch-size",
    "seed": "--seed",
    "skip_tokenizer_init": "this command, which needs the tokenizer",
    "disable_log_stats": "this command, which reads its progress from them",
}


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """How the target model answers; the same settings give the same answers.

    Attributes:
        model: directory or hub name of the target model.
        revision: of a hub name.
        temperature: 0 for greedy answers.
        top_p: share of the probability to sample from, likeliest tokens first.
        max_tokens: of an answer, its end token included.
        max_prompt_tokens: of all that an answer follows; None for what `max_tokens` leaves of the
            model's context.
        seed: of the samples; each answer has its own, made from this, its prompt's id and its turn.
        batch_size: prompts at once; None for vLLM's own default.
        llm_options: further arguments of `vllm.LLM`.
    """

    model: str
    revision: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    max_prompt_tokens: int | None = None
    seed: int = 0
    batch_size: int | None = None
    llm_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"--temperature {self.temperature}: give 0 or a positive number",
        )
        _require(0 < self.top_p <= 1, f"--top-p {self.top_p}: give a number above 0, up to 1")
        for name in ("max_tokens", "max_prompt_tokens", "batch_size"):
            value = getattr(self, name)
            option = f"--{name.replace('_', '-')}"
            _require(value is None or value >= 1, f"{option} {value}: give a positive number")
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = self.llm_options.get(name, 1)
            _require(
                isinstance(size, int) and size >= 1,
                f"--llm-options: {name} is {size!r}; give a positive integer",
            )
        for name, option in _OWN_OPTIONS.items():
            _require(name not in self.llm_options, f"--llm-options: {name!r} is set by {option}")

    @property
    def world_size(self) -> int:
        """Number of devices that one engine is split over."""
        options = self.llm_options
        tensor_parallel: int = options.get("tensor_parallel_size", 1)
        pipeline_parallel: int = options.get("pipeline_parallel_size", 1)
        return tensor_parallel * pipeline_parallel

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values; `AnswerSettings(**d)` reads it back."""
        return asdict(self) | {"llm_options": dict(self.llm_options)}


def answer_seed(seed: int, prompt_id: str, turn: int) -> int:
    """Return the seed of one answer, whatever batch or shard it is made in: 63 bits."""
    digest = hashlib.sha256(f"{seed}\n{turn}\n{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
