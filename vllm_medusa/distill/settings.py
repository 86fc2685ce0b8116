"""The settings of `distill`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import PositiveInt

from vllm_medusa.data.prompts import OnBad
from vllm_medusa.data.rows import ShardFormat
from vllm_medusa.errors import UserError
from vllm_medusa.settings import PathText, settings
from vllm_medusa.target.settings import AnswerSettings


@settings
class DistillSettings:
    """The settings of one run of `distill`."""

    FLAGS: ClassVar[Mapping[str, str]] = {"shard_format": "--format", "ray_address": "--ray"}

    answers: AnswerSettings
    """The model, and how it answers."""
    prompts: PathText
    """JSON lines of texts, chats, ShareGPT conversations or MT-Bench questions."""
    out: PathText
    """Directory of the rows; an interrupted run in it is completed."""
    shard_size: PositiveInt = 256
    """Number of prompts for each file."""
    shard_format: ShardFormat = "parquet"
    """Format of the files."""
    on_bad: OnBad = "error"
    """What to do about lines that are malformed or too long."""
    ray_address: str | None = None
    """Use the Ray cluster at ADDRESS; 'auto': the running one; without ADDRESS: start one here."""
    num_workers: PositiveInt = 1
    """Number of engines on Ray."""

    def __post_init__(self) -> None:
        if self.num_workers > 1 and self.ray_address is None:
            raise UserError(f"--num-workers {self.num_workers}: only with --ray")
