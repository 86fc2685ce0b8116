"""One line for a user's mistake, where Python would print a traceback of ours.

Some mistakes show only in a process that vLLM made for the engine: that the KV cache has no room
for forks, that heads hold NaN. Such a process says what is wrong in a file that the front end made
and named in the environment, and ends without a word. The front end, which waits for it, raises the
error as its own: so the line comes last, where people look, and ``LLM(...)`` raises a `UserError`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_medusa.errors import UserError

#: Environment variable with the path of the file. vLLM warns of those that begin with its name.
_FILE_VARIABLE = "MEDUSA_ERROR_FILE"
_PACKAGE = "vllm_medusa"
#: Where Ray's text of a worker's error says that it came from.
_RAY_NODE = re.compile(r"\bip=([\w.:]+)")


@cache
def install_one_line_errors() -> None:
    """Print uncaught errors of ours as one line; all others as before. Once in a process."""
    previous = sys.excepthook

    def excepthook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            _print_line(str(error))
        else:
            previous(kind, error, traceback)

    sys.excepthook = excepthook


@cache
def collect_errors() -> None:
    """Have the processes that vLLM makes from this one say here what is wrong."""
    descriptor, path = tempfile.mkstemp(prefix="vllm-medusa-", suffix=".txt")
    os.close(descriptor)
    os.environ[_FILE_VARIABLE] = path
    atexit.register(_end_collecting, Path(path), os.getpid())


def _end_collecting(path: Path, pid: int) -> None:
    if os.getpid() != pid:
        return
    # Nobody waited for the process: one of several engines, or one of another front end.
    if message := _collected():
        _print_line(message)
    path.unlink(missing_ok=True)


@contextmanager
def handed_over() -> Iterator[None]:
    """Say a `UserError` to the front end, if this is a process that vLLM made for the engine."""
    try:
        yield
    except UserError as error:
        if _is_vllm_process():
            try:
                Path(os.environ[_FILE_VARIABLE]).write_text(str(error), encoding="utf-8")
            except (KeyError, OSError):
                _print_line(str(error))
        raise


@contextmanager
def exit_in_one_line() -> Iterator[None]:
    """End a process that vLLM made for the engine without a traceback of a user's mistake.

    vLLM would log the traceback there, and ``multiprocessing`` print it once more. In any other
    process the error is left alone.
    """
    try:
        with handed_over():
            yield
    except Exception as error:
        # Of a worker that has said what is wrong, vLLM tells its engine core in words of its own.
        if _is_vllm_process() and (isinstance(error, UserError) or _collected()):
            raise SystemExit(1) from None
        raise


@contextmanager
def said_by_ray_workers() -> Iterator[None]:
    """Raise what is wrong in a worker on Ray as a `UserError` of this process.

    Ray raises an error of a worker as one that is of its class too, whose text is the worker's
    traceback and which has the error itself as ``cause`` (``RayTaskError`` in ray/exceptions.py).
    """
    try:
        yield
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise UserError(str(cause)) from None
        if isinstance(cause, ModuleNotFoundError) and cause.name == _PACKAGE:
            found = _RAY_NODE.search(str(error))
            node = found[1] if found else "of a worker"
            raise UserError(
                f"{_PACKAGE} is not installed on the Ray node {node}, in the environment of its "
                "vLLM; install this version of vllm-medusa there too"
            ) from None
        raise


def wrap_executor(original: Any) -> Any:
    """End the engine core's process in one line for what its workers find while they are made."""

    def initialise(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        with exit_in_one_line(), said_by_ray_workers():
            original(self, vllm_config, *args, **kwargs)

    return initialise


def wrap_wait_for_engine_startup(original: Any) -> Any:
    """Raise what an engine core's process has said, where vLLM says that it has ended."""

    def wait_for_engine_startup(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except RuntimeError:
            message = _collected()
            if not message:
                raise
            Path(os.environ[_FILE_VARIABLE]).write_text("")
        raise UserError(message)

    return wait_for_engine_startup


def _collected() -> str:
    """Return what a process has said is wrong."""
    with suppress(KeyError, OSError):
        return Path(os.environ[_FILE_VARIABLE]).read_text(encoding="utf-8")
    return ""


def _is_vllm_process() -> bool:
    """Whether vLLM made this process, for an engine core or a worker.

    It names them so in ``v1/engine/utils.py`` and ``v1/executor/multiproc_executor.py``.
    """
    return multiprocessing.current_process().name.startswith(("EngineCore", "VllmWorker"))


def _print_line(message: str) -> None:
    sys.stderr.write(f"vllm_medusa: error: {message}\n")
    sys.stderr.flush()
