"""The online comparison: a server per variant, and vLLM's own load generator."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_medusa.bench.engines import EnginePool
from vllm_medusa.bench.figures import ONLINE, Measurement
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.prompts import RANDOM, PromptSet
from vllm_medusa.bench.report import Findings
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.variants import Variant
from vllm_medusa.engines.engine import has_accelerator
from vllm_medusa.engines.process import Process
from vllm_medusa.engines.server import VLLM, ServerProcess
from vllm_medusa.errors import UserError

#: Requests before each measurement that do not count.
NUM_WARM_UPS = 2
_DRAFTS = "spec_decode_num_drafts"
_ACCEPTED_SHARES = "spec_decode_per_position_acceptance_rates"
#: Figures, and what `vllm bench serve` calls them.
_FIGURES = {
    "requests_per_s": "request_throughput",
    "tokens_per_s": "output_throughput",
    "tokens_per_step": "spec_decode_acceptance_length",
    "ttft_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_ms": "median_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
    "e2e_ms": "median_e2el_ms",
}
#: What else is kept of its result.
_KEPT = (
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("max_concurrent_requests", _DRAFTS, _ACCEPTED_SHARES),
    *(
        f"{statistic}_{metric}_ms"
        for metric in ("ttft", "tpot", "itl", "e2el")
        for statistic in ("mean", "median", "p90", "p99")
    ),
)


@dataclass(frozen=True)
class Load:
    """The load that the load generator makes.

    Attributes:
        request_rate: requests per second; inf: all at once.
        concurrency: most requests at the same time; None: no limit.
    """

    request_rate: float
    concurrency: int | None = None

    def __str__(self) -> str:
        rate = "all at once" if math.isinf(self.request_rate) else f"{self.request_rate:g}/s"
        return rate if self.concurrency is None else f"{rate}, {self.concurrency} at once"


def loads_of(settings: Settings) -> list[Load]:
    """Every request rate with every limit of concurrency."""
    return [
        Load(rate, concurrency)
        for concurrency in settings.concurrency or (None,)
        for rate in settings.request_rates
    ]


def measurement_of(
    variant: str,
    load: Load,
    number: int,
    result: Mapping[str, Any],
    counters: Mapping[str, float],
    peak_memory_bytes: int,
) -> Measurement:
    """Return the measurement of one run of the load generator on one server.

    Args:
        variant: its name.
        load: the load.
        number: of the round, from 1.
        result: of ``vllm bench serve``; times in milliseconds, throughputs per second.
        counters: how the server's counters grew (warm-up requests included).
        peak_memory_bytes: largest resident memory of the server's processes so far.
    """
    # Without drafts, a request gets one token in each step.
    result = {"spec_decode_acceptance_length": 1.0, **result}
    latency_ms, num_drafts = result["median_e2el_ms"], result.get(_DRAFTS, 0)
    return Measurement(
        variant=variant,
        load=load,
        round=number,
        speed=1 / latency_ms if latency_ms else 0.0,
        samples={name: [result.get(theirs, 0.0)] for name, theirs in _FIGURES.items()},
        num_drafts=num_drafts,
        accepted_by_depth=[share * num_drafts for share in result.get(_ACCEPTED_SHARES, ())],
        totals={
            "num_failed": int(result.get("failed", 0)),
            "num_preemptions": int(counters.get("vllm:num_preemptions", 0)),
        },
        peaks={"peak_memory_bytes": peak_memory_bytes},
        summary=f"{result['output_throughput']:.1f} tokens/s, {latency_ms / 1000:.2f} s a request",
        line={
            "result": {
                name: result[name]
                for name in (*_FIGURES.values(), *_KEPT)
                if result.get(name) is not None
            },
            "metrics": {name: value for name, value in counters.items() if value},
            "peak_memory_bytes": peak_memory_bytes,
        },
    )


class Online:
    """The online mode, as `run.compare` drives it.

    Args:
        plan: of the comparison.
        folder: directory for files of the load generator.

    Raises:
        UserError: pandas is missing, which the load generator reads prompts with.
    """

    kind = ONLINE

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder
        self._data = dataset_flags(plan.settings, plan.prompts, folder)
        self.rounds = dict.fromkeys(loads_of(plan.settings), plan.settings.rounds)

    def start(self, variant: Variant) -> ServerProcess:
        """Start a variant's server."""
        settings = self._plan.settings
        options = {**self._plan.options, **variant.llm_options}
        environment = {**self._plan.environment, **_thread_binding(settings)}
        model = str(options.pop("model"))
        return ServerProcess(
            model, variant.speculative, options, {**environment, **variant.environment}
        )

    def warm_up(self, server: ServerProcess) -> None:
        """Do nothing: the load generator warms up before each measurement."""

    def measure(self, server: ServerProcess, variant: str, load: Load, number: int) -> Measurement:
        """Measure the server in a round."""
        before = server.metrics()
        result = drive(self._plan.settings, server.port, load, number, self._data, self._folder)
        grown = {name: value - before.get(name, 0) for name, value in server.metrics().items()}
        if not result.get("completed"):
            raise server.failure()
        return measurement_of(variant, load, number, result, grown, server.peak_memory())

    def conclude(
        self, pool: EnginePool[ServerProcess], measurements: Sequence[Measurement]
    ) -> Findings:
        """Add only a note to the figures."""
        return Findings(notes=["Outputs are compared by the offline mode."])


def _thread_binding(settings: Settings) -> dict[str, str]:
    """Bind a CPU server's engine to as many cores as it may have threads, if a number was given.

    vLLM's own choice, all cores, takes no number.
    """
    if settings.threads is None or has_accelerator():
        return {}
    cores = sorted(os.sched_getaffinity(0))[: settings.threads]
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}


def dataset_flags(settings: Settings, prompts: PromptSet, folder: Path) -> list[str]:
    """Options of ``vllm bench serve`` for the prompts.

    Raises:
        UserError: pandas is missing, which it reads prompts with.
    """
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


def drive(
    settings: Settings, port: int, load: Load, number: int, data: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Run ``vllm bench serve``; all variants get the same requests at the same times.

    Raises:
        EngineProcessError: it gives no result.
    """
    file = folder / "load.json"
    file.unlink(missing_ok=True)
    command = [
        *(*VLLM, "bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions"),
        *("--host", "127.0.0.1", "--port", str(port), "--model", settings.model, *data),
        *("--num-prompts", str(settings.num_requests), "--num-warmups", str(NUM_WARM_UPS)),
        *("--request-rate", str(load.request_rate), "--seed", str(settings.seed + number)),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "90,99"),
        *("--temperature", str(settings.temperature), "--disable-tqdm", "--save-result"),
        *("--result-dir", str(folder), "--result-filename", file.name),
    ]
    if load.concurrency is not None:
        command += ["--max-concurrency", str(load.concurrency)]
    if settings.ignore_eos:
        command.append("--ignore-eos")
    if (tokenizer := settings.llm_options.get("tokenizer")) is not None:
        command += ["--tokenizer", str(tokenizer)]
    with Process(command, {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}) as generator:
        generator.end()
        if not file.exists():
            raise generator.failure()
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result
