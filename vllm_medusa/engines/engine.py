"""A vLLM engine in a process of its own, driven by commands.

Variants that are compared each run in such a process, and are timed in rounds (A B C, A B C, ...),
so that a machine whose speed drifts does not decide. The other end is `engines.run_worker`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_medusa.engines.process import ProcessEndedError, WorkerProcess
from vllm_medusa.errors import UserError

_WORKER = "vllm_medusa.engines.run_worker"


#: What Python prints last of an exception: its type and message.
_EXCEPTION = re.compile(
    r"^(?:\([^)]*\) |[A-Z]+ \S+ \S+ \[[^\]]*\] )*([\w.]*(?:Error|Exception): .*)$"
)

#: What our plugin prints of a user's mistake, without a traceback.
_OUR_ERROR = "vllm_medusa: error: "


class EngineProcessError(RuntimeError):
    """The engine's process failed; the message holds the end of its log.

    Attributes:
        reason: the last exception in the log, in one line.

    """

    def __init__(self, log: str) -> None:
        super().__init__(f"the engine's process ended; its log ends:\n{log[-3000:]}")
        self.reason = last_exception(log)


def last_exception(log: str) -> str:
    """The last exception of a log in one line, or the log's last line if it shows none."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    for index in reversed(range(len(lines))):
        if match := _EXCEPTION.match(lines[index]):
            message = match[1]
            if "validation error" in message:  # pydantic says what is wrong in the lines below
                message = " ".join([message, *(line.strip() for line in lines[index + 1 :][:1])])
            return message
        if lines[index].startswith(_OUR_ERROR):
            return lines[index].removeprefix(_OUR_ERROR)
    return lines[-1].strip() if lines else "it ended without a word"


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
    """What is known once an engine is up.

    Attributes:
        startup_s: seconds from the start of its process on.
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
    """What one run of a batch of prompts gave.

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
        num_preemptions: requests that had to make room in the KV cache and start again.
        peak_memory_bytes: largest resident memory of the engine's processes so far.
        device_memory_bytes: largest memory reserved by PyTorch on the accelerator; None on a CPU.
        stage_ms: milliseconds in each stage of each step, if the plugin runs with
            ``VLLM_MEDUSA_TIMERS=1`` (`plugin.worker.timers`); else empty.

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
    """Environment variables that give an engine so many OpenMP threads.

    vLLM's n-gram lookup sets the number of numba's threads, all cores by default. They are
    OpenMP's, so that the model itself would run on them too.
    """
    return {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}


class EngineProcess:
    """Starts an engine; use as a context manager, or `close` it.

    Args:
        options: arguments of ``vllm.LLM``.
        environment: environment variables beside the caller's own.
        prepare: a Python file run in the process before the engine is made.

    """

    def __init__(
        self,
        options: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        prepare: Path | None = None,
    ) -> None:
        quiet = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            **thread_environment(default_threads()),
        }
        self._started = time.monotonic()
        self._worker = WorkerProcess(_WORKER, {**quiet, **(environment or {})})
        try:
            self._worker.send(
                {"options": dict(options), "prepare": str(prepare) if prepare else None}
            )
        except BaseException as error:
            self.close(patience_s=0)
            if isinstance(error, ProcessEndedError):
                raise EngineProcessError(error.log) from None
            raise

    def wait(self) -> EngineInfo:
        """Wait until the engine is up.

        Raises:
            EngineProcessError: if it does not come up.

        """
        reply = self._receive()
        return EngineInfo(startup_s=time.monotonic() - self._started, **reply)

    def run(self, prompts: Sequence[str | Sequence[int]], max_tokens: int, **sampling: Any) -> Run:
        """Generate for all prompts as one batch, greedily unless ``sampling`` says otherwise."""
        command = {"prompts": list(prompts), "max_tokens": max_tokens, "sampling": sampling}
        return Run.from_reply(self._call(command))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Log-probability that the model gives the last token of each sequence after the others."""
        logprobs: list[float] = self._call({"score": [list(tokens) for tokens in sequences]})
        return logprobs

    @property
    def pid(self) -> int:
        """Process id, also that of its session and process group."""
        return self._worker.pid

    def close(self, patience_s: float | None = None) -> None:
        """End the process, which may finish what it does for so long, and all that it started."""
        self._worker.close(patience_s)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(patience_s=None if error is None else 0)

    def _call(self, command: Mapping[str, Any]) -> Any:
        try:
            self._worker.send(command)
        except ProcessEndedError as error:
            raise EngineProcessError(error.log) from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._worker.receive()
        except ProcessEndedError as error:
            raise EngineProcessError(error.log) from None


def start_engine(
    options: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> EngineProcess:
    """Start an engine and wait until it is up.

    Args:
        options: arguments of ``vllm.LLM``.
        environment: environment variables beside the caller's own.

    Raises:
        UserError: it does not come up; in one line why.

    """
    engine = EngineProcess(options, environment)
    try:
        engine.wait()
    except EngineProcessError as error:
        engine.close()
        raise UserError(
            f"vLLM does not start with {dict(options)}: {error.reason}; correct --llm-options"
        ) from None
    except BaseException:
        engine.close(patience_s=0)
        raise
    return engine
