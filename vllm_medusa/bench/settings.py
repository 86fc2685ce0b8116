"""All settings of a comparison, checked before anything is started."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm_medusa.bench.variants import Variant, parse_variants, variants_of_config
from vllm_medusa.engines.engine import default_threads, has_accelerator, thread_environment
from vllm_medusa.errors import UserError

Alive = Literal["auto", "all", "one"]
DEFAULT_VARIANTS = ("baseline", "tree", "chain", "vllm-chain", "ngram")
DTYPES = ("auto", "bfloat16", "float16", "float32")
#: A CPU engine's KV cache unless told otherwise: by default vLLM takes most of the memory, which
#: leaves none for the other engines of a comparison.
CPU_KV_CACHE_BYTES = 2**30
#: By annotation: what a YAML file may give, and its name.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a text"),
    "str | None": ((str, type(None)), "a text"),
    "bool": ((bool,), "true or false"),
    "int": ((int,), "an integer"),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to compare, on what, and how often.

    Attributes:
        model: the target model: directory or hub name.
        heads: Medusa heads; None: the model's own directory holds them.
        variants: as `variants.parse_variants` or `variants.variants_of_config` read them.
        prompts: a file, ``builtin`` or ``random``.
        batch_sizes: requests at once (offline).
        max_tokens: new tokens of a request, at most.
        rounds: how often each variant has its turn.
        min_prompts: what every batch size runs at least, in further rounds if need be (offline).
        dtype: vLLM's.
        llm_options: further arguments of ``vllm.LLM`` (in online mode: of ``vllm serve``).
        ignore_eos: always write ``max_tokens`` tokens.
        random_len: tokens of a random prompt.
        seed: of the random prompts and of the load generator.
        threads: OpenMP threads of an engine; None: as `process.default_threads` says.
        alive: keep all engines alive, or one at a time; auto: all if the memory suffices.
        strict: fail if an output of a lossless variant is not the baseline's.
        out: directory of the results.
        overwrite: replace the results of an earlier run there.
        profile_steps: time engine steps by draft nodes and batch size, and nothing else.
        online: measure servers instead of offline engines.
        request_rates: requests per second (online).
        concurrency: requests at once at most (online); empty: no bound.
        num_requests: requests of one online measurement.
    """

    model: str
    heads: str | None = None
    variants: Any = DEFAULT_VARIANTS
    prompts: str = "builtin"
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    max_tokens: int = 128
    rounds: int = 5
    min_prompts: int = 1
    dtype: str = "auto"
    llm_options: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = False
    random_len: int = 128
    seed: int = 0
    threads: int | None = None
    alive: Alive = "auto"
    strict: bool = False
    out: Path = Path("bench-results")
    overwrite: bool = False
    profile_steps: bool = False
    online: bool = False
    request_rates: tuple[float, ...] = (1.0, 2.0, math.inf)
    concurrency: tuple[int, ...] = ()
    num_requests: int = 32

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if (kind := _KINDS.get(str(setting.type))) and not isinstance(value, kind[0]):
                raise UserError(f"{setting.name}: {value!r} given; give {kind[1]}")
        for name in ("max_tokens", "rounds", "min_prompts", "random_len", "num_requests"):
            if not _is_count(getattr(self, name)):
                raise UserError(f"{name}: {getattr(self, name)!r} given; give a positive integer")
        for name, numbers in (("batch_sizes", self.batch_sizes), ("concurrency", self.concurrency)):
            if not all(map(_is_count, numbers)) or len(set(numbers)) != len(numbers):
                raise UserError(f"{name}: {list(numbers)} given; give different positive integers")
        if not self.batch_sizes:
            raise UserError("batch_sizes: none given; give at least one")
        if not self.request_rates or not all(
            isinstance(rate, int | float) and rate > 0 for rate in self.request_rates
        ):
            raise UserError(
                f"request_rates: {list(self.request_rates)} given; give positive numbers or inf"
            )
        if self.online and self.profile_steps:
            raise UserError("online and profile_steps: give one of them")
        if self.threads is not None and not _is_count(self.threads):
            raise UserError(f"threads: {self.threads!r} given; give a positive integer")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype: {self.dtype!r} given; give one of {', '.join(DTYPES)}")
        if self.alive not in ("auto", "all", "one"):
            raise UserError(f"alive: {self.alive!r} given; give auto, all or one")
        if not isinstance(self.llm_options, Mapping):
            raise UserError(f"llm_options: {self.llm_options!r} given; give a JSON object")
        if "speculative_config" in self.llm_options:
            raise UserError("llm_options: speculative_config is each variant's own; give it there")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"out: {self.out} is not a directory; name another")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError(
                "matplotlib, which draws the plots, is not installed; run "
                'pip install "vllm-medusa[bench]"'
            )

    def parsed_variants(self) -> list[Variant]:
        """Read the variants.

        Raises:
            UserError: as `parse_variants`.
        """
        if isinstance(self.variants, tuple):
            return parse_variants(self.variants, self.heads)
        return variants_of_config(self.variants, self.heads)

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON has them."""
        values = dataclasses.asdict(self)
        rates = ["inf" if math.isinf(rate) else rate for rate in self.request_rates]
        return values | {"out": str(self.out), "request_rates": rates}


def settings_from(given: Mapping[str, Any], config_file: Path | None) -> Settings:
    """Join the command line's settings with a YAML file's; the command line wins.

    Args:
        given: by name of `Settings`; None where the command line says nothing.
        config_file: a YAML mapping by the same names, or None.

    Raises:
        UserError: an unusable file, an unknown name, or a value that cannot be.
    """
    values = _read_config(config_file) if config_file else {}
    values |= {name: value for name, value in given.items() if value is not None}
    if not values.get("model"):
        raise UserError("no model given; give --model, or model: in the file of --config")
    return Settings(**values)


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
    known = [setting.name for setting in dataclasses.fields(Settings)]
    for name in values:
        if name not in known:
            raise UserError(
                f"--config {path}: unknown setting {name!r}; known are {', '.join(known)}"
            )
    for name in ("batch_sizes", "request_rates", "concurrency"):
        if name in values:
            if not isinstance(values[name], list):
                raise UserError(f"--config {path}: {name} is {values[name]!r}; give a list")
            values[name] = tuple(math.inf if value == "inf" else value for value in values[name])
    if "out" in values:
        values["out"] = Path(str(values["out"]))
    return values


def engine_environment(settings: Settings) -> dict[str, str]:
    """Environment variables of every engine."""
    return thread_environment(settings.threads or default_threads())


def engine_options(settings: Settings) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` common to all variants.

    Prefix caching is off, so that a prompt that comes again costs the same again.
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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
