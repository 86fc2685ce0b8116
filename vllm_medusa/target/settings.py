"""The settings that decide the rows of `distill`, apart from the prompts and the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from vllm_medusa.errors import UserError
from vllm_medusa.settings import refuse_own_options, settings

#: Arguments of `vllm.LLM` that the caller may not set, and what sets them.
_OWN_OPTIONS = {
    "model": "--model",
    "revision": "--revision",
    "max_num_seqs": "--batch-size",
    "seed": "--seed",
    "skip_tokenizer_init": "this command, which needs the tokenizer",
    "disable_log_stats": "this command, which reads vLLM's counters",
}


@settings
class AnswerSettings:
    """How the target model answers; the same settings give the same answers."""

    model: str
    """The target model: directory or hub name."""
    revision: str | None = None
    """Revision of the model, if it is a hub name."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Temperature of sampling; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most probable tokens that have this probability in all (top-p)."""
    max_tokens: PositiveInt = 512
    """Largest number of tokens of an answer, its end token included."""
    max_prompt_tokens: PositiveInt | None = None
    """Largest number of tokens before an answer; longer prompts are bad lines (what --max-tokens
    leaves of the model's context)."""
    seed: int = 0
    """Seed of the samples; each answer gets its own from it, the prompt's id and the turn."""
    batch_size: PositiveInt | None = None
    """Number of prompts at the same time (vLLM's default)."""
    llm_options: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of vllm.LLM, such as '{"dtype": "float32"}'."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = self.llm_options.get(name, 1)
            if not isinstance(size, int) or size < 1:
                raise UserError(f"--llm-options: {name} is {size!r}; give a positive integer")
        refuse_own_options(self.llm_options, _OWN_OPTIONS)

    @property
    def world_size(self) -> int:
        """Number of devices that one engine is split over."""
        options = self.llm_options
        tensor_parallel: int = options.get("tensor_parallel_size", 1)
        pipeline_parallel: int = options.get("pipeline_parallel_size", 1)
        return tensor_parallel * pipeline_parallel


def answer_seed(seed: int, prompt_id: str, turn: int) -> int:
    """Return the seed (63 bits) of one answer, which does not depend on its batch or shard."""
    digest = hashlib.sha256(f"{seed}\n{turn}\n{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
