"""A module of ours in a process of its own, spoken to in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Any

#: Time that a process has to end by itself when it is closed.
_PATIENCE_S = 20


class ProcessEndedError(RuntimeError):
    """The process ended unasked.

    Attributes:
        log: what it wrote to its standard output and error.
    """

    def __init__(self, status: int, log: str) -> None:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        super().__init__(f"the process {how}")
        self.log = log


class WorkerProcess:
    """Runs ``python -m MODULE FD``; use as a context manager, or `close` it.

    The module reads a line of JSON for each message from standard input, until that is closed, and
    writes its messages to the file descriptor FD. What it writes elsewhere is its log.

    Args:
        module: dotted name.
        environment: environment variables beside the caller's own.
    """

    def __init__(self, module: str, environment: Mapping[str, str]) -> None:
        # Unnamed temporary file: read for the error message, gone with the process.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(write)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[write],
            # Ctrl-C is for the caller, who closes the process.
            start_new_session=True,
            env={**os.environ, **environment},
            text=True,
            encoding="utf-8",
        )
        os.close(write)
        self._messages = os.fdopen(read, encoding="utf-8")

    def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            ProcessEndedError: nobody reads it.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            ProcessEndedError: none will come.
        """
        line = self._messages.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    @property
    def pid(self) -> int:
        """Process id, also that of its session and process group."""
        return self._process.pid

    def close(self, patience_s: float | None = None) -> None:
        """End the process, which may finish what it does for so long, and all that it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_PATIENCE_S if patience_s is None else patience_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._messages.close()
        self._log.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(patience_s=None if error is None else 0)

    def _failure(self) -> ProcessEndedError:
        status = self._process.wait()
        self._log.seek(0)
        return ProcessEndedError(status, self._log.read().decode(errors="replace"))
