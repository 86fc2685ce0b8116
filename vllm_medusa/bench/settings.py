"""All settings of a comparison, checked before anything is started."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from vllm_medusa.bench.variants import Variant, variants_of_config
from vllm_medusa.engines.engine import has_accelerator
from vllm_medusa.errors import UserError
from vllm_medusa.reporting.plots import check_matplotlib
from vllm_medusa.settings import Counts, PathText, as_json, refuse_own_options, settings

Alive = Literal["auto", "all", "one"]
DEFAULT_VARIANTS = ("baseline", "tree", "chain", "vllm-chain", "ngram")
#: A CPU engine's KV cache unless told otherwise: by default vLLM takes most of the memory, which
#: leaves none for the other engines of a comparison.
CPU_KV_CACHE_BYTES = 2**30
#: Also from a YAML file, where infinity may be written ``inf``.
_Rate = Annotated[PositiveFloat, Field(strict=False)]


@settings
class Settings:
    """The settings of a comparison."""

    model: str
    """The target model: directory or hub name."""
    heads: str | None = None
    """The Medusa heads (those in the model's own directory)."""
    variants: Any = DEFAULT_VARIANTS
    """The variants, as `variants.variants_of_config` takes them."""
    prompts: str = "builtin"
    """The prompts: a JSONL file, builtin or random."""
    random_len: PositiveInt = 128
    """Number of tokens of a random prompt."""
    max_tokens: PositiveInt = 128
    """Largest number of new tokens of a request."""
    temperature: NonNegativeFloat = 0.0
    """Temperature of sampling; 0 is greedy. Offline each request has a seed."""
    rounds: PositiveInt = 5
    """Number of rounds; in each round every variant has one turn."""
    ignore_eos: bool = False
    """Always generate --max-tokens tokens."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of the model."""
    llm_options: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of vllm.LLM; with --online, of vllm serve."""
    threads: PositiveInt | None = None
    """OpenMP threads of an engine ($OMP_NUM_THREADS; if not set, on a CPU all cores)."""
    alive: Alive = "auto"
    """Engines alive at the same time; auto: all, if there is enough memory."""
    seed: int = 0
    """Seed of the random prompts, the engines and the load generator."""
    strict: bool = False
    """Fail if an output of a lossless variant is not the baseline's."""
    out: PathText = Path("bench-results")
    """Directory of the results."""
    overwrite: bool = False
    """Replace the results of an earlier run there."""
    profile_steps: bool = False
    """Measure engine steps by draft nodes and batch size, for calibrate --step-costs."""
    batch_sizes: Annotated[Counts, Field(min_length=1)] = (1, 2, 4, 8, 16, 32)
    """Batch sizes: numbers of requests at the same time."""
    min_prompts: PositiveInt = 1
    """Run at least N prompts at every batch size; small ones get more rounds."""
    online: bool = False
    """Measure servers instead of offline engines."""
    request_rates: Annotated[tuple[_Rate, ...], Field(strict=False, min_length=1)] = (
        *(1.0, 2.0),
        math.inf,
    )
    """Requests per second; inf: all at once."""
    concurrency: Counts = ()
    """Largest numbers of requests at the same time (no limit)."""
    num_requests: PositiveInt = 32
    """Number of requests of one measurement."""

    def __post_init__(self) -> None:
        if self.online and self.profile_steps:
            raise UserError("--online and --profile-steps: give one of them")
        own = {"speculative_config": "each variant; give it there"}
        refuse_own_options(self.llm_options, own)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out}: is not a directory; name another")
        check_matplotlib("bench")

    def parsed_variants(self) -> list[Variant]:
        """Read the variants.

        Raises:
            UserError: as `variants_of_config`.
        """
        return variants_of_config(self.variants, self.heads)

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON has them."""
        rates = ["inf" if math.isinf(rate) else rate for rate in self.request_rates]
        return as_json(self) | {"request_rates": rates}


def settings_from(given: Mapping[str, Any], config_file: Path | None) -> Settings:
    """Join the command line's settings with a YAML file's; the command line wins.

    Args:
        given: by name of `Settings`.
        config_file: a YAML mapping by the same names, or None.

    Raises:
        UserError: an unusable file, an unknown name, or a wrong value.
    """
    return Settings(**{**(_read_config(config_file) if config_file else {}), **given})


def _read_config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UserError(f"--config {path}: {exc.strerror}; give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise UserError(f"--config {path}: not YAML ({exc})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds no mapping; see docs/benchmarking.md")
    return values


def engine_options(settings: Settings) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` common to all variants.

    Prefix caching is off, so that a repeated prompt has the same cost.
    """
    options: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "enable_prefix_caching": False,
        "seed": settings.seed,
    }
    if not has_accelerator() and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        options["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    return options | dict(settings.llm_options)
