"""Processes that run vLLM: each in a session of its own, ended with all that it started."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

#: Time that a process has to end by itself when it is closed.
_PATIENCE_S = 20.0
#: The last line that Python prints of an exception: its type and message.
_EXCEPTION = re.compile(
    r"^(?:\([^)]*\) |[A-Z]+ \S+ \S+ \[[^\]]*\] )*([\w.]*(?:Error|Exception): .*)$"
)
#: Beginning of the line that our plugin prints for a user's mistake.
_OUR_ERROR = "vllm_medusa: error: "


class EngineProcessError(RuntimeError):
    """A process that runs vLLM failed; the message holds the end of its log.

    Attributes:
        reason: the reason in one line: the process's own message, else the last exception in its
            log.
        ending: how the process ended if it sent no message; None if it sent one.
    """

    def __init__(self, reason: str, log: str = "", ending: str | None = None) -> None:
        said = f"the engine's process {ending}" if ending else reason
        super().__init__(f"{said}; its log ends:\n{log[-3000:]}" if log else said)
        self.reason = reason
        self.ending = ending


def last_exception(log: str) -> str:
    """The last exception of a log in one line, or the log's last line if it shows none."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    for index in reversed(range(len(lines))):
        if match := _EXCEPTION.match(lines[index]):
            message = match[1]
            if "validation error" in message:  # pydantic gives the reason in the lines below
                message = " ".join([message, *(line.strip() for line in lines[index + 1 :][:1])])
            return message
        if lines[index].startswith(_OUR_ERROR):
            return lines[index].removeprefix(_OUR_ERROR)
    return lines[-1].strip() if lines else "it ended without a message"


class Running(Protocol):
    """What is used of `subprocess.Popen`; see there."""

    @property
    def pid(self) -> int:
        """Process id."""

    def poll(self) -> int | None:
        """Status, None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Status, once it has ended."""


class Process:
    """Runs a command; use as a context manager, or `close` it.

    Its standard output and error are its log. Ctrl-C goes to the caller only, which closes the
    process: at once if there was an exception.

    Args:
        command: and its arguments.
        environment: environment variables beside the caller's own.
        pass_fds: file descriptors that it inherits.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        # Unnamed: gone with the process.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.started = time.monotonic()
        self._process = self._start(command, {**os.environ, **environment}, pass_fds)

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int]
    ) -> Running:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=environment,
            pass_fds=pass_fds,
        )

    @property
    def pid(self) -> int:
        """Process id, also that of its session and process group."""
        return self._process.pid

    def end(self) -> int:
        """Wait for its end; return its status."""
        return self._process.wait()

    def failure(self, reason: str | None = None) -> EngineProcessError:
        """The error to raise.

        Args:
            reason: the process's message; None: take it from the log.
        """
        # `seek` would move where the process writes.
        size = os.fstat(self._log.fileno()).st_size
        log = os.pread(self._log.fileno(), size, 0).decode(errors="replace")
        if reason is not None:
            return EngineProcessError(" ".join(reason.split()), log)
        status = self._process.poll()
        if status is None:
            ending = "does not answer"
        else:
            ending = (
                f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            )
        return EngineProcessError(last_exception(log), log, ending)

    def close(self, patience_s: float | None = None) -> None:
        """End it and all that it started; it has this time to finish."""
        self._ask_to_end()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_PATIENCE_S if patience_s is None else patience_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            self._log.close()

    def _ask_to_end(self) -> None:
        if self._process.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(patience_s=None if error is None else 0)
