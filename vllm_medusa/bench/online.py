"""The online comparison: a server per variant, driven by vLLM's own load generator."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_medusa.bench.engines import EnginePool, VariantState
from vllm_medusa.bench.prompts import RANDOM, PromptSet
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.turns import Watcher, take_turns
from vllm_medusa.bench.variants import Variant
from vllm_medusa.engines.engine import EngineInfo, EngineProcessError, has_accelerator
from vllm_medusa.engines.server import VLLM, ServerProcess
from vllm_medusa.errors import UserError

#: Requests before each measurement that do not count.
NUM_WARM_UPS = 2
#: What is kept of the result of ``vllm bench serve``.
_KEPT = (
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "output_throughput",
    "max_concurrent_requests",
    *(
        f"{statistic}_{metric}_ms"
        for metric in ("ttft", "tpot", "itl", "e2el")
        for statistic in ("mean", "median", "p90", "p99")
    ),
)


@dataclass(frozen=True, order=True)
class Load:
    """What the load generator does.

    Attributes:
        request_rate: requests per second; inf: all at once.
        concurrency: requests at once, at most; None: no bound.
    """

    request_rate: float
    concurrency: int | None = None

    def __str__(self) -> str:
        rate = "all at once" if math.isinf(self.request_rate) else f"{self.request_rate:g}/s"
        return rate if self.concurrency is None else f"{rate}, {self.concurrency} at once"


@dataclass(frozen=True)
class OnlineMeasurement:
    """One pass of the load generator over one server.

    Attributes:
        variant: its name.
        load: what the load generator did.
        round: number of the round, from 1.
        result: of ``vllm bench serve``; times in milliseconds, throughputs per second.
        metrics: how the server's counters grew (warm-up requests included).
        peak_memory_bytes: largest resident memory of the server's processes so far.
    """

    variant: str
    load: Load
    round: int
    result: Mapping[str, float]
    metrics: Mapping[str, float]
    peak_memory_bytes: int

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a request and step with drafts (acceptance length); 1 without speculation."""
        drafts = self.metrics.get("vllm:spec_decode_num_drafts", 0)
        accepted = self.metrics.get("vllm:spec_decode_num_accepted_tokens", 0)
        return 1 + accepted / drafts if drafts else 1.0

    @property
    def load_name(self) -> str:
        """The load in words."""
        return str(self.load)

    @property
    def summary(self) -> str:
        """What it gave, in a few words."""
        speed, latency_ms = self.result["output_throughput"], self.result["median_e2el_ms"]
        return f"{speed:.1f} tokens/s, {latency_ms / 1000:.2f} s a request"

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {
            "variant": self.variant,
            "load": self.load_name,
            "round": self.round,
            "result": dict(self.result),
            "metrics": {name: value for name, value in self.metrics.items() if value},
            "peak_memory_bytes": self.peak_memory_bytes,
        }


@dataclass(frozen=True)
class OnlineResult:
    """All that an online comparison gave.

    Attributes:
        measurements: in order of time.
        states: by variant.
        kept_all: whether all servers were alive at once.
    """

    measurements: Sequence[OnlineMeasurement]
    states: Mapping[str, VariantState]
    kept_all: bool


def loads_of(settings: Settings) -> list[Load]:
    """Every request rate with every bound on the concurrency."""
    return [
        Load(rate, concurrency)
        for concurrency in settings.concurrency or (None,)
        for rate in settings.request_rates
    ]


def run_online(
    settings: Settings,
    variants: Sequence[Variant],
    prompts: PromptSet,
    options: Mapping[str, Any],
    environment: Mapping[str, str],
    unavailable: Mapping[str, str],
    watcher: Watcher[Load, OnlineMeasurement],
    folder: Path,
) -> OnlineResult:
    """Measure all variants; whatever happens, no server stays behind.

    Args:
        settings: of the comparison.
        variants: the baseline first.
        prompts: to send.
        options: arguments of ``vllm.LLM`` common to all variants, the model among them.
        environment: environment variables common to all variants.
        unavailable: reasons by the names of variants that are known not to run here.
        watcher: is told of every turn.
        folder: for files of the load generator.

    Raises:
        UserError: pandas is missing, which the load generator reads prompts with.
        EngineProcessError: the baseline does not run.
    """
    data = _dataset_flags(settings, prompts, folder)
    environment = {**environment, **_thread_binding(settings)}
    common = {name: value for name, value in options.items() if name != "model"}

    def start(variant: Variant) -> ServerProcess:
        own = {**common, **variant.llm_options}
        return ServerProcess(
            str(own.pop("model", settings.model)),
            variant.speculative,
            own,
            {**environment, **variant.environment},
        )

    def on_start(name: str, server: ServerProcess, info: EngineInfo) -> None:
        watcher.started(name, info)

    def measure(server: ServerProcess, name: str, load: Load, number: int) -> OnlineMeasurement:
        before = server.metrics()
        result = _drive(settings, server, load, number, data, folder)
        after = server.metrics()
        grown = {key: value - before.get(key, 0) for key, value in after.items()}
        if not result.get("completed"):
            raise server.failure()
        return OnlineMeasurement(name, load, number, result, grown, server.peak_memory())

    by_name = {variant.name: variant for variant in variants}
    with EnginePool(by_name, start, settings.alive, on_start) as pool:
        rounds = dict.fromkeys(loads_of(settings), settings.rounds)
        measurements = take_turns(pool, rounds, unavailable, measure, watcher)
    return OnlineResult(measurements, pool.states, pool.keeps_all)


def _thread_binding(settings: Settings) -> dict[str, str]:
    """Bind a CPU server's engine to as many cores as it may have threads, if a number was given.

    vLLM's own choice, all cores, takes no number.
    """
    if settings.threads is None or has_accelerator():
        return {}
    cores = sorted(os.sched_getaffinity(0))[: settings.threads]
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}


def _dataset_flags(settings: Settings, prompts: PromptSet, folder: Path) -> list[str]:
    if prompts.source == RANDOM:
        lengths = ["--random-input-len", str(settings.random_len)]
        lengths += ["--random-output-len", str(settings.max_tokens)]
        return ["--dataset-name", "random", *lengths, "--random-range-ratio", "0"]
    if importlib.util.find_spec("pandas") is None:
        raise UserError(
            "pandas, which `vllm bench serve` reads prompts with, is not installed; run "
            "pip install pandas, or give --prompts random"
        )
    path = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": prompt.text}) for prompt in prompts.prompts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    # The prompts are rendered already.
    flags = ["--dataset-name", "custom", "--dataset-path", str(path), "--skip-chat-template"]
    return [*flags, "--custom-output-len", str(settings.max_tokens)]


def _drive(
    settings: Settings,
    server: ServerProcess,
    load: Load,
    number: int,
    data: Sequence[str],
    folder: Path,
) -> dict[str, float]:
    """Run ``vllm bench serve``; all variants get the same requests at the same times."""
    file = folder / "load.json"
    file.unlink(missing_ok=True)
    command = [
        *(*VLLM, "bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions"),
        *("--host", "127.0.0.1", "--port", str(server.port), "--model", settings.model, *data),
        *("--num-prompts", str(settings.num_requests), "--num-warmups", str(NUM_WARM_UPS)),
        *("--request-rate", str(load.request_rate), "--seed", str(settings.seed + number)),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "90,99"),
        *("--temperature", "0", "--disable-tqdm", "--save-result"),
        *("--result-dir", str(folder), "--result-filename", file.name),
    ]
    if load.concurrency is not None:
        command += ["--max-concurrency", str(load.concurrency)]
    if settings.ignore_eos:
        command.append("--ignore-eos")
    tokenizer = settings.llm_options.get("tokenizer")
    if tokenizer is not None:
        command += ["--tokenizer", str(tokenizer)]
    status, log = _run(command)
    if not file.exists():
        raise EngineProcessError(log or f"vllm bench serve ended with status {status}")
    result = json.loads(file.read_text(encoding="utf-8"))
    return {key: result[key] for key in _KEPT if result.get(key) is not None}


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command to its end; nothing of it survives an exception."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"},
    ) as process:
        try:
            log, _ = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, log
