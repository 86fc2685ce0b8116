"""Processes that run vLLM: each in a session of its own, ended with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

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


class Process:
    """Runs a command; use as a context manager, or `close` it.

    Its standard output and error are its log. Ctrl-C goes to the caller only, which closes the
    process: at once if there was an exception.

    Args:
        command: and its arguments.
        environment: environment variables beside the caller's own.
        pipes: further arguments of `subprocess.Popen`.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], **pipes: Any
    ) -> None:
        # Unnamed: gone with the process.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self.started = time.monotonic()
        self._process: subprocess.Popen[str] = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env={**os.environ, **environment},
            **{"stdin": subprocess.DEVNULL, **pipes},
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
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._log.close()

    def _ask_to_end(self) -> None:
        self._process.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(patience_s=None if error is None else 0)


class WorkerProcess(Process):
    """Runs ``python -m MODULE FD``, a module of ours.

    The module reads a line of JSON for each message from standard input, until that is closed, and
    writes its messages to the file descriptor FD. A message ``{"error": REASON}`` is its last.

    Args:
        module: dotted name.
        environment: environment variables beside the caller's own.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        read, write = os.pipe()
        super().__init__(
            [sys.executable, "-m", module, str(write)],
            environment,
            stdin=subprocess.PIPE,
            pass_fds=[write],
            text=True,
            encoding="utf-8",
        )
        os.close(write)
        self._messages = os.fdopen(read, encoding="utf-8")

    def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            EngineProcessError: the process does not read it.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self.receive()  # its last message

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            EngineProcessError: there will be no message, or the message is an error.
        """
        line = self._messages.readline()
        if not line:
            self.end()
            raise self.failure()
        message = json.loads(line)
        if isinstance(message, dict) and "error" in message:
            raise self.failure(message["error"])
        return message

    def close(self, patience_s: float | None = None) -> None:
        """See `Process.close`."""
        super().close(patience_s)
        self._messages.close()

    def _ask_to_end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
