"""The engine's end of `engines.engine`: reads commands, runs them, replies.

Standard input gives the engine's options, then commands, a line of JSON each. The replies are, a
line each: `{"value"}` when the engine is up and at the end of each command, `{"progress"}` as a
run goes on, and `{"error"}`, one line, as the last.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO

from vllm_medusa.engines.memory import peak_memory, private_memory

#: Without effects: which plugins are loaded, and how, is for each engine.
_IMPORTS = (
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm_medusa.plugin.register",
    "vllm_medusa.plugin.worker.v1.runner",
)
_REPORT_SECONDS = 1.0
_SECONDS_TO_END = 5.0

#: Sends a message.
Reply = Callable[..., None]


def prepare() -> None:
    """Import what engines on a CPU need, so that forks of this process have it."""
    for module in _IMPORTS:
        importlib.import_module(module)


def main(reply_fd: int) -> None:
    """Serve commands from standard input until it is closed; reply to ``reply_fd``."""
    with os.fdopen(reply_fd, "w", encoding="utf-8") as replies:

        def reply(**message: Any) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        try:
            _serve(_read_ahead(sys.stdin), reply)
        except BrokenPipeError:
            raise
        except Exception as exc:
            traceback.print_exc()
            reply(error=reason_of(exc))


def _serve(messages: Iterator[Any], reply: Reply) -> None:
    start = next(messages)
    if start["watch"]:
        from vllm_medusa.engines.watching import watch_engine

        watch_engine(Path(start["watch"]))
    llm = _make_engine(start["options"])
    reply(value=_describe())
    for command in messages:
        if "score" in command:
            reply(value=_score(llm, command["score"]))
        elif "reset_prefix_cache" in command:
            reply(value=llm.reset_prefix_cache())
        else:
            reply(value=_run(llm, command, reply))
    llm.llm_engine.engine_core.shutdown()


def reason_of(error: Exception) -> str:
    """The error in one line; of pydantic's reports only the part for the user."""
    if hasattr(error, "errors"):
        return "; ".join(str(entry["msg"]) for entry in error.errors())
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | RuntimeError) and text:
        return text
    return f"{type(error).__name__}: {text}"


def _read_ahead(lines: TextIO) -> Iterator[Any]:
    """Parse lines as they come, until their writer is gone.

    A run takes minutes. If the caller was killed, the process does not finish the run.
    """
    read: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read_all() -> None:
        for line in lines:
            read.put(line)
        read.put("")
        time.sleep(_SECONDS_TO_END)
        os._exit(1)

    threading.Thread(target=read_all, daemon=True).start()
    while line := read.get():
        yield json.loads(line)


def _make_engine(options: dict[str, Any]) -> Any:
    from vllm import LLM

    world_size = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
    defaults = {
        "disable_log_stats": False,
        "distributed_executor_backend": "uni" if world_size == 1 else "mp",
    }
    return LLM(**{**defaults, **options})


def _describe() -> dict[str, Any]:
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    return {
        "device": current_platform.device_type,
        "device_name": None if is_cpu else current_platform.get_device_name(),
        "peak_memory_bytes": peak_memory(os.getpid()),
        "private_memory_bytes": private_memory(os.getpid()),
    }


def _run(llm: Any, command: dict[str, Any], reply: Reply) -> dict[str, Any]:
    engine = llm.llm_engine
    requests = [_Request() for _ in command["prompts"]]
    _take_stages(llm)
    before, ours_before = _counts(llm), _our_counts(llm)
    start = time.perf_counter()
    _add_requests(engine, command)
    step_ms: list[float] = []
    progress = _Progress(reply)
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        outputs = engine.step()
        end = time.perf_counter()
        for output in outputs:
            request = requests[int(output.request_id.rsplit("-", 1)[1])]
            request.add(output.outputs[0], len(step_ms), 1000 * (end - start))
            progress.add(output.finished, len(output.outputs[0].token_ids))
        progress.tell()
        step_ms.append(1000 * (end - begin))
    progress.tell(at_once=True)
    counts = [
        [now - was for now, was in zip_longest(*both, fillvalue=0)]
        for both in zip(_counts(llm), before, strict=True)
    ]
    (drafts,), (accepted,), by_depth, (preemptions,) = counts
    return {
        "token_ids": [request.token_ids for request in requests],
        "texts": [request.text for request in requests],
        "step_ms": step_ms,
        "stage_ms": _take_stages(llm),
        "full_steps": [
            max(request.first_step for request in requests) + 1,
            min(request.last_step for request in requests) + 1,
        ],
        "requests": [request.times() for request in requests],
        "num_drafts": drafts,
        "num_accepted": accepted,
        "accepted_by_depth": by_depth,
        "num_preemptions": preemptions,
        "medusa": {
            name: count - ours_before.get(name, 0) for name, count in _our_counts(llm).items()
        },
        "peak_memory_bytes": peak_memory(os.getpid()),
        "device_memory_bytes": _device_memory(),
    }


def _add_requests(engine: Any, command: dict[str, Any]) -> None:
    """Add all requests before the first step, so that batches are the same each time."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = {"temperature": 0, "max_tokens": command["max_tokens"], **command["sampling"]}
    for index, prompt in enumerate(command["prompts"]):
        given = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        own = {"seed": command["seeds"][index]} if command["seeds"] else {}
        params = SamplingParams(**{**sampling, **own}, output_kind=RequestOutputKind.DELTA)
        engine.add_request(f"{time.monotonic_ns()}-{index}", given, params)


class _Progress:
    """Sends the numbers of ended requests and of new tokens, about once a second."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._counts = [0, 0]
        self._time = time.monotonic()

    def add(self, has_ended: bool, num_tokens: int) -> None:
        self._counts[0] += has_ended
        self._counts[1] += num_tokens

    def tell(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._time > _REPORT_SECONDS:
            self._reply(progress=self._counts)
            self._counts, self._time = [0, 0], now


@dataclass
class _Request:
    """The tokens of one request; steps are counted from 0, times from the start of the run."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    emitted: list[int] = field(default_factory=list)
    first_step: int = 0
    last_step: int = 0
    first_ms: float = 0.0
    last_ms: float = 0.0
    has_ended: bool = False

    def add(self, delta: Any, step: int, now_ms: float) -> None:
        if not self.token_ids:
            self.first_step, self.first_ms = step, now_ms
        self.token_ids += delta.token_ids
        self.text += delta.text
        if delta.token_ids:
            self.emitted.append(len(delta.token_ids))
        self.last_step, self.last_ms = step, now_ms
        self.has_ended = delta.finish_reason == "stop"

    def times(self) -> dict[str, Any]:
        further = len(self.token_ids) - 1
        return {
            "ttft_ms": self.first_ms,
            "tpot_ms": (self.last_ms - self.first_ms) / further if further > 0 else None,
            "emitted": self.emitted,
            "has_ended": self.has_ended,
        }


def _take_stages(llm: Any) -> list[dict[str, float]]:
    """Milliseconds in each stage of each step since the last call; none unless timers are on."""
    from vllm_medusa.plugin.identity import WORKER_CLASS
    from vllm_medusa.plugin.worker import timers

    worker_cls = llm.llm_engine.vllm_config.parallel_config.worker_cls
    if not timers.are_wanted() or worker_cls != WORKER_CLASS:
        return []
    times: list[dict[str, float]] = llm.collective_rpc("medusa_step_times")[0]
    return times


def _score(llm: Any, sequences: list[list[int]]) -> list[float]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in sequences]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        output.prompt_logprobs[-1][tokens[-1]].logprob
        for output, tokens in zip(outputs, sequences, strict=True)
    ]


def _counts(llm: Any) -> tuple[list[int], ...]:
    """vLLM's counters: drafts, accepted tokens, accepted tokens by depth, preemptions."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}

    def values(name: str) -> list[int]:
        metric = metrics.get(f"vllm:{name}")
        if metric is None:
            return []
        return [int(value) for value in getattr(metric, "values", None) or [metric.value]]

    return (
        values("spec_decode_num_drafts") or [0],
        values("spec_decode_num_accepted_tokens") or [0],
        values("spec_decode_num_accepted_tokens_per_pos"),
        values("num_preemptions") or [0],
    )


def _our_counts(llm: Any) -> dict[str, int]:
    """The plugin's counters, by name; none without it."""
    prefix = "vllm:medusa_"
    return {
        metric.name.removeprefix(prefix): int(metric.value)
        for metric in llm.get_metrics()
        if metric.name.startswith(prefix)
    }


def _device_memory() -> int | None:
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
