"""Files that are written completely or not at all, in directories that one run writes at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vllm_medusa.errors import UserError

#: Suffix that nothing else uses, so that removing leftovers removes no file of the user.
_TEMPORARY_SUFFIX = ".medusa-tmp"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, then give it its name.

    Killed at any point, at most a temporary file stays, for `remove_temporary_files`.

    Args:
        path: the file; replaced if there.
        write: given the open file, writes its content.

    Raises:
        UserError: it cannot be written, for instance on a full disk; nothing has changed.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY_SUFFIX}")
    try:
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as exc:
        raise UserError(
            f"{path}: cannot be written ({exc.strerror or exc}); an existing file is unchanged"
        ) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(content))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document as `write_atomically` does."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: of the file.
        what: what the file should be, for the error.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UserError(f"{path}: {exc.strerror}; give {what}") from None
    except ValueError as exc:
        raise UserError(f"{path}: not JSON ({exc}); give {what}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; give {what}")
    return value


def remove_temporary_files(directory: Path) -> None:
    """Remove what killed calls of `write_atomically` left in a directory."""
    for path in directory.glob(f".*{_TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


@contextmanager
def locked_directory(directory: Path, command: str) -> Iterator[None]:
    """Take a directory for one run of a command, made if it is not there.

    Args:
        directory: to be written.
        command: what an error calls the run that has taken it.

    Raises:
        UserError: it cannot be made, or another run has taken it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise UserError(f"{directory}: cannot be written as a directory ({exc.strerror})") from None
    try:
        _lock(directory, descriptor, command)
        yield
    finally:
        os.close(descriptor)


def _lock(directory: Path, descriptor: int, command: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(
                f"{directory}: another {command} is writing it; wait for it or name another "
                "directory"
            ) from None
        # Some network file systems cannot lock directories; there the user must keep runs apart.


def _sync_directory(directory: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
