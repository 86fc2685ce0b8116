"""One line for a user's mistake, where Python would print a traceback of ours."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType

from vllm_medusa.errors import UserError


@cache
def install_one_line_errors() -> None:
    """Print uncaught errors of ours as one line; all others as before. Once in a process."""
    previous = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            _print_line(error)
        else:
            previous(kind, error, traceback)

    sys.excepthook = excepthook


@contextmanager
def exit_in_one_line(is_own_process: bool) -> Iterator[None]:
    """End vLLM's engine process with one line for a user's mistake.

    vLLM would log the traceback there, and ``multiprocessing`` print it once more.

    Args:
        is_own_process: whether the process has no other purpose; else the error is left alone.

    """
    try:
        yield
    except UserError as error:
        if not is_own_process:
            raise
        _print_line(error)
        raise SystemExit(1) from None


def is_vllm_process() -> bool:
    """Whether vLLM made this process, for an engine core or a worker.

    It names them so in ``v1/engine/utils.py`` and ``v1/executor/multiproc_executor.py``.
    """
    return multiprocessing.current_process().name.startswith(("EngineCore", "VllmWorker"))


def _print_line(error: BaseException) -> None:
    sys.stderr.write(f"vllm_medusa: error: {error}\n")
    sys.stderr.flush()
