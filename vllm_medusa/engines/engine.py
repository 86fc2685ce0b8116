"""A vLLM engine in a process of its own, driven by commands.

Variants that are compared each run in such a process, and are timed in rounds (A B C, A B C, ...),
so that a machine whose speed changes does not distort the result. The other end is
`engines.worker`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_medusa.engines.process import EngineProcessError
from vllm_medusa.engines.worker_process import WorkerProcess
from vllm_medusa.errors import UserError

_WORKER = "vllm_medusa.engines.worker"


@dataclass(frozen=True)
class RequestTimes:
    """When one request of a run got its tokens, and how it ended.

    Attributes:
        ttft_ms: time from the start of the run to the request's first token, in milliseconds.
        tpot_ms: mean time per further token, in milliseconds; None if there was only one.
        emitted: how many tokens each step gave it that gave it any, the prompt's own first.
        has_ended: whether the model ended its text; if not, a limit of tokens did.

    """

    ttft_ms: float
    tpot_ms: float | None
    emitted: list[int]
    has_ended: bool

    @property
    def num_steps(self) -> int:
        """Steps that gave it tokens, the prompt's own among them."""
        return len(self.emitted)


@dataclass(frozen=True)
class EngineInfo:
    """Information on an engine that has started.

    Attributes:
        startup_s: seconds from the start of its process on; what its starter had imported before is
            not among them.
        device: the processor's kind in PyTorch's words (``cpu``, ``cuda``, ...).
        device_name: the accelerator's name; None on a CPU.
        peak_memory_bytes: largest resident memory so far, all its processes.
        private_memory_bytes: resident memory that is not files, all its processes.

    """

    startup_s: float
    device: str
    device_name: str | None
    peak_memory_bytes: int
    private_memory_bytes: int


@dataclass(frozen=True)
class Run:
    """The result of one run of a batch of prompts.

    Attributes:
        token_ids: emitted tokens of each prompt.
        texts: the same as text.
        step_ms: wall-clock time of each engine step, in milliseconds; the prompts' own steps are
            the first ones.
        full_steps: first and last (exclusive) of the steps between the last request's first token
            and the first request's last one, so with the whole batch decoding.
        requests: each request's times.
        num_drafts: request steps that verified drafts.
        num_accepted: draft tokens accepted.
        accepted_by_depth: of the request steps, how many accepted a draft token at depth 1, 2, ...
        num_preemptions: preemptions of requests, because the KV cache was full.
        peak_memory_bytes: largest resident memory of the engine's processes so far.
        device_memory_bytes: largest memory reserved by PyTorch on the accelerator; None on a CPU.
        stage_ms: milliseconds in each stage of each step, if the plugin runs with
            ``VLLM_MEDUSA_TIMERS=1`` (`plugin.worker.timers`); else empty.
        medusa: the plugin's counters (`plugin.counters`), by name; empty without the plugin.

    """

    token_ids: list[list[int]]
    texts: list[str]
    step_ms: list[float]
    full_steps: tuple[int, int]
    requests: list[RequestTimes]
    num_drafts: int
    num_accepted: int
    accepted_by_depth: list[int]
    num_preemptions: int
    peak_memory_bytes: int
    device_memory_bytes: int | None
    stage_ms: list[dict[str, float]] = field(default_factory=list)
    medusa: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_reply(cls, reply: Mapping[str, Any]) -> Run:
        """Read the worker's reply."""
        return cls(
            **{
                **reply,
                "full_steps": tuple(reply["full_steps"]),
                "requests": [RequestTimes(**times) for times in reply["requests"]],
            }
        )

    @property
    def num_tokens(self) -> int:
        """Number of tokens emitted."""
        return sum(len(tokens) for tokens in self.token_ids)

    @property
    def seconds(self) -> float:
        """Wall-clock time of all steps."""
        return sum(self.step_ms) / 1000

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a request gets in a decode step, with drafts or not (acceptance length)."""
        num_steps = sum(times.num_steps - 1 for times in self.requests)
        return (self.num_tokens - len(self.requests)) / num_steps if num_steps else 1.0

    @property
    def decode_step_ms(self) -> list[float]:
        """Times of the steps in which the whole batch decodes; of all steps if there are none."""
        begin, end = self.full_steps
        return self.step_ms[begin:end] or self.step_ms


def has_accelerator() -> bool:
    """Whether engines run on a GPU here."""
    import torch

    return torch.cuda.is_available()


def default_threads() -> int:
    """OpenMP threads of an engine: $OMP_NUM_THREADS, else one per core on a CPU, one on a GPU."""
    inherited = os.environ.get("OMP_NUM_THREADS", "")
    if inherited.isdigit():
        return int(inherited)
    return 1 if has_accelerator() else len(os.sched_getaffinity(0))


def thread_environment(threads: int) -> dict[str, str]:
    """Environment variables that give an engine this many OpenMP threads.

    vLLM's n-gram lookup sets numba's number of threads, by default all cores. numba uses OpenMP's
    threads, so this would also change the model's number of threads.
    """
    return {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}


class EngineProcess(WorkerProcess):
    """Starts an engine; use as a context manager, or `close` it.

    Args:
        options: arguments of ``vllm.LLM``.
        environment: environment variables beside the caller's own.
        watch: a file that the engine adds a line of JSON to for each event (`engines.watching`).

    Raises:
        EngineProcessError: like all methods, if the process fails.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        watch: Path | None = None,
    ) -> None:
        quiet = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            **thread_environment(default_threads()),
        }
        # Forks cannot use a GPU that an import has touched; imports do not on a CPU.
        prepares = not has_accelerator()
        super().__init__(_WORKER, {**quiet, **(environment or {})}, prepares=prepares)
        try:
            self.send({"options": dict(options), "watch": str(watch) if watch else None})
        except BaseException:
            self.close(patience_s=0)
            raise

    def wait(self) -> EngineInfo:
        """Wait until the engine has started."""
        told = self.receive()["value"]
        return EngineInfo(startup_s=time.monotonic() - self.started, **told)

    def run(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_tokens: int,
        *,
        seeds: Sequence[int] | None = None,
        report: Callable[[int, int], object] = lambda *_: None,
        **sampling: Any,
    ) -> Run:
        """Generate for all prompts as one batch, greedily unless ``sampling`` says otherwise.

        Args:
            prompts: texts or token ids.
            max_tokens: of each.
            seeds: of each, if they have their own.
            report: called about once a second with the numbers of requests that have ended and of
                tokens since the last call.
            sampling: further arguments of ``vllm.SamplingParams``.
        """
        command = {"prompts": prompts, "max_tokens": max_tokens, "sampling": sampling}
        self.send({**command, "seeds": seeds})
        while "value" not in (reply := self.receive()):
            report(*reply["progress"])
        return Run.from_reply(reply["value"])

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability that the model gives the last token of each sequence after the others."""
        self.send({"score": sequences})
        logprobs: list[float] = self.receive()["value"]
        return logprobs

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache; return whether this was possible."""
        self.send({"reset_prefix_cache": True})
        return bool(self.receive()["value"])


def start_engine(
    options: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    watch: Path | None = None,
) -> EngineProcess:
    """Start an engine and wait until it has started.

    Args:
        options: arguments of ``vllm.LLM``.
        environment: environment variables beside the caller's own.
        watch: as `EngineProcess` has it.

    Raises:
        UserError: it does not start; the message says why in one line.
    """
    with ExitStack() as stack:
        engine = stack.enter_context(EngineProcess(options, environment, watch))
        try:
            engine.wait()
        except EngineProcessError as error:
            raise UserError(
                f"vLLM does not start with {dict(options)}: {error.reason}; correct these options"
            ) from None
        stack.pop_all()
    return engine
