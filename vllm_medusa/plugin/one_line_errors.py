"""One line for a user's mistake, instead of a traceback.

Some mistakes are found only in a process that vLLM started for the engine: the KV cache has no room
for forks, or heads hold NaN. Such a process writes the error to a file, whose path the front end
put into the environment, and ends without output. The front end, which waits for the process,
raises the error as its own. So the line is the last one that is printed, and ``LLM(...)`` raises a
`UserError`.
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
    """Print our uncaught errors as one line; other errors are unchanged. Once in a process."""
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
    """Collect here the errors of the processes that vLLM starts from this one."""
    descriptor, path = tempfile.mkstemp(prefix="vllm-medusa-", suffix=".txt")
    os.close(descriptor)
    os.environ[_FILE_VARIABLE] = path
    atexit.register(_end_collecting, Path(path), os.getpid())


def _end_collecting(path: Path, pid: int) -> None:
    if os.getpid() != pid:
        return
    # The front end did not wait for this process: it is one of several engines or front ends.
    if message := _collected():
        _print_line(message)
    path.unlink(missing_ok=True)


@contextmanager
def handed_over() -> Iterator[None]:
    """Send a `UserError` to the front end, if vLLM started this process for the engine."""
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
    """End a process that vLLM started for the engine without a traceback of a user's mistake.

    vLLM would log the traceback, and ``multiprocessing`` would print it again. In other processes
    the error is unchanged.
    """
    try:
        with handed_over():
            yield
    except Exception as error:
        # If a worker has sent its error, vLLM gives the engine core an error with another text.
        if _is_vllm_process() and (isinstance(error, UserError) or _collected()):
            raise SystemExit(1) from None
        raise


@contextmanager
def errors_of_ray_workers() -> Iterator[None]:
    """Raise the error of a worker on Ray as a `UserError` of this process.

    Ray raises an error of a worker as an error that has the same class, the worker's traceback as
    its text and the error itself as ``cause`` (``RayTaskError`` in ray/exceptions.py).
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
    """End the engine core's process in one line if its workers find a mistake at their start."""

    def initialise(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        with exit_in_one_line(), errors_of_ray_workers():
            original(self, vllm_config, *args, **kwargs)

    return initialise


def wrap_wait_for_engine_startup(original: Any) -> Any:
    """Raise the error that an engine core's process has sent, when vLLM finds that it has ended."""

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
    """Return the error that a process has sent."""
    with suppress(KeyError, OSError):
        return Path(os.environ[_FILE_VARIABLE]).read_text(encoding="utf-8")
    return ""


def _is_vllm_process() -> bool:
    """Whether vLLM started this process, for an engine core or a worker.

    vLLM sets their names in ``v1/engine/utils.py`` and ``v1/executor/multiproc_executor.py``.
    """
    return multiprocessing.current_process().name.startswith(("EngineCore", "VllmWorker"))


def _print_line(message: str) -> None:
    sys.stderr.write(f"vllm_medusa: error: {message}\n")
    sys.stderr.flush()
