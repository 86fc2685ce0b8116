"""The engine's end of `engines.engine`: reads commands, runs them, replies with measurements."""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from vllm_medusa.engines.memory import peak_memory, private_memory


def main(reply_fd: int) -> None:
    """Serve commands from standard input until it is closed; reply to ``reply_fd``."""
    with os.fdopen(reply_fd, "w", encoding="utf-8") as replies:
        start = json.loads(sys.stdin.readline())
        if start["prepare"]:
            runpy.run_path(start["prepare"])
        llm = _make_engine(start["options"])
        _reply(replies, _describe())
        for line in sys.stdin:
            command = json.loads(line)
            if "score" in command:
                _reply(replies, _score(llm, command["score"]))
            else:
                _reply(replies, _run(llm, command))


def _make_engine(options: dict[str, Any]) -> Any:
    from vllm import LLM

    defaults: dict[str, Any] = {"disable_log_stats": False}
    if options.get("tensor_parallel_size", 1) == 1:
        defaults["distributed_executor_backend"] = "uni"
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


def _reply(replies: Any, answer: Any) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


def _run(llm: Any, command: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    params = SamplingParams(
        **{"temperature": 0, "max_tokens": command["max_tokens"], **command["sampling"]},
        output_kind=RequestOutputKind.DELTA,
    )
    requests = [_Request() for _ in command["prompts"]]
    _take_stages(llm)
    before = _counts(llm)
    start = time.perf_counter()
    for index, prompt in enumerate(command["prompts"]):
        given = prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        engine.add_request(f"{time.monotonic_ns()}-{index}", given, params)
    step_ms: list[float] = []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        outputs = engine.step()
        end = time.perf_counter()
        for output in outputs:
            request = requests[int(output.request_id.rsplit("-", 1)[1])]
            request.add(output.outputs[0], len(step_ms), 1000 * (end - start))
        step_ms.append(1000 * (end - begin))
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
        "peak_memory_bytes": peak_memory(os.getpid()),
        "device_memory_bytes": _device_memory(),
    }


@dataclass
class _Request:
    """What one request got so far; steps are counted from 0, times from the start of the run."""

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


def _device_memory() -> int | None:
    import torch

    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None


if __name__ == "__main__":
    main(int(sys.argv[1]))
