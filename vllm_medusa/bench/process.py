"""A vLLM engine in a process of its own, driven by commands.

Variants that are compared each run in such a process, and are timed in rounds (A B C, A B C, ...),
so that a machine whose speed drifts does not decide. The other end is `engine.bench_worker`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_WORKER = "vllm_medusa.engine.bench_worker"


class EngineProcessError(RuntimeError):
    """The engine's process failed; the message holds the end of its log."""


@dataclass(frozen=True)
class Run:
    """What one run of a batch of prompts gave.

    Attributes:
        token_ids: emitted tokens of each prompt.
        texts: the same as text.
        step_ms: wall-clock time of each engine step, in milliseconds; the prompts' own steps are
            the first ones.
        num_drafts: request steps that verified drafts.
        num_accepted: draft tokens accepted.

    """

    token_ids: list[list[int]]
    texts: list[str]
    step_ms: list[float]
    num_drafts: int
    num_accepted: int

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
        """Tokens that a request emits in a step with drafts; 1 without speculation."""
        return 1 + self.num_accepted / self.num_drafts if self.num_drafts else 1.0


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
        # Unnamed temporary file: read for the error message, gone with the process.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        reply, write = os.pipe()
        quiet = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER, str(write)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[write],
            env={**os.environ, **quiet, **(environment or {})},
            text=True,
        )
        os.close(write)
        self._replies = os.fdopen(reply, encoding="utf-8")
        start = {"options": dict(options), "prepare": str(prepare) if prepare else None}
        try:
            self._call(start, wait=False)
        except BaseException:
            self.close()
            raise

    def wait(self) -> None:
        """Wait until the engine is up.

        Raises:
            EngineProcessError: if it does not come up.

        """
        self._reply()

    def run(self, prompts: Sequence[str | Sequence[int]], max_tokens: int, **sampling: Any) -> Run:
        """Generate for all prompts as one batch, greedily unless ``sampling`` says otherwise."""
        command = {"prompts": list(prompts), "max_tokens": max_tokens, "sampling": sampling}
        return Run(**self._call(command))

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()
        self._log.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, command: Mapping[str, Any], wait: bool = True) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self._reply() if wait else None

    def _reply(self) -> Any:
        line = self._replies.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> EngineProcessError:
        self._process.wait()
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")
        return EngineProcessError(f"the engine's process ended; its log ends:\n{log[-3000:]}")
