"""Processes that run a module of ours and exchange messages with it.

Each is a fork of a starter, a process that has done the module's imports (`engines.starter`).
Importing vLLM takes seconds, and tools start one engine after the other.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_medusa.engines.process import Process

_STARTER = "vllm_medusa.engines.starter"
_LONGEST_NEWS = 32


class Fork:
    """A fork of a starter, with what `Process` uses of `subprocess.Popen`.

    Args:
        pid: its process id.
        news: where the starter tells how it ended.
    """

    def __init__(self, pid: int, news: socket.socket) -> None:
        self.pid = pid
        self._news = news
        self._status: int | None = None

    def poll(self) -> int | None:
        """How it ended; None if it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """How it ended, once it has.

        Raises:
            subprocess.TimeoutExpired: it runs longer than these seconds.
        """
        if self._status is None:
            self._news.settimeout(timeout)
            try:
                told = self._news.recv(_LONGEST_NEWS)
            except (BlockingIOError, TimeoutError):
                raise subprocess.TimeoutExpired(_STARTER, timeout or 0) from None
            # Nothing is told if the starter was killed; what kills it kills its forks.
            self._status = int(told) if told else -signal.SIGKILL
            self._news.close()
        return self._status


class Starter(Process):
    """Starts the starter of a module; it ends with this process.

    Args:
        module: dotted name.
        environment: environment variables beside the caller's own.
        prepares: whether the starter calls the module's ``prepare()``.
    """

    def __init__(self, module: str, environment: Mapping[str, str], prepares: bool) -> None:
        self._orders, orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        number = str(orders.fileno())
        command = [sys.executable, "-m", _STARTER, number, module, str(int(prepares))]
        with orders:
            super().__init__(command, environment, pass_fds=[orders.fileno()])

    def fork(self, environment: Mapping[str, str], descriptors: Sequence[int]) -> Fork:
        """Fork, which waits for the imports.

        Args:
            environment: all environment variables.
            descriptors: of the fork's standard input, of its log, and of where its replies go.

        Raises:
            EngineProcessError: the starter has ended.
        """
        news, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        order = json.dumps({"environment": dict(environment), "folder": os.getcwd()})
        try:
            with told:
                socket.send_fds(self._orders, [order.encode()], [*descriptors, told.fileno()])
            pid = int(news.recv(_LONGEST_NEWS))
        except (ConnectionError, ValueError):  # it says nothing
            news.close()
            starter.cache_clear()
            raise self.failure() from None
        return Fork(pid, news)

    def close(self, patience_s: float | None = None) -> None:
        """See `Process.close`."""
        self._orders.close()
        super().close(patience_s)


@functools.cache
def starter(module: str, environment: tuple[tuple[str, str], ...], prepares: bool) -> Starter:
    """Return a module's starter; arguments are those of `Starter`."""
    started = Starter(module, dict(environment), prepares)
    atexit.register(started.close, patience_s=0)
    return started


class WorkerProcess(Process):
    """Runs ``main(FD)`` of a module of ours.

    The module reads a line of JSON for each message from standard input, until that is closed, and
    writes its messages to the file descriptor FD. A message ``{"error": REASON}`` is its last.

    Args:
        module: dotted name.
        environment: environment variables beside the caller's own. Processes with equal ones share
            a starter, so all that is read at import must be among them.
        prepares: whether the module's ``prepare()`` runs before, once for all of them.

    Raises:
        EngineProcessError: the starter has failed.
    """

    def __init__(self, module: str, environment: Mapping[str, str], *, prepares: bool) -> None:
        self._starter = starter(module, tuple(sorted(environment.items())), prepares)
        super().__init__([module], environment)
        self.started = time.monotonic()  # without the starter's imports, for which the first waits

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int]
    ) -> Fork:
        standard_input, commands = os.pipe()
        messages, replies = os.pipe()
        self._commands = os.fdopen(commands, "w", encoding="utf-8")
        self._messages = os.fdopen(messages, encoding="utf-8")
        try:
            return self._starter.fork(environment, [standard_input, self._log.fileno(), replies])
        finally:
            os.close(standard_input)
            os.close(replies)

    def send(self, message: Any) -> None:
        """Send a message.

        Raises:
            EngineProcessError: nobody reads it.
        """
        try:
            self._commands.write(json.dumps(message) + "\n")
            self._commands.flush()
        except BrokenPipeError:
            self.receive()  # what it said before it went

    def receive(self) -> Any:
        """Wait for a message.

        Raises:
            EngineProcessError: none will come, or it says what went wrong.
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
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()
