"""The directory that `distill` writes: its lock, its checks, its provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_medusa.data.rows import PROVENANCE_FILE
from vllm_medusa.errors import UserError
from vllm_medusa.files import locked_directory, remove_temporary_files, write_json

PROVENANCE_FORMAT = "vllm_medusa.distill/1"


@contextmanager
def open_output(directory: Path, made_from: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Lock a directory for a run of `distill`; create it if needed.

    Args:
        directory: empty, or written by a run with the same settings.
        made_from: everything that decides the rows, as JSON values.

    Yields:
        The provenance that the directory holds; empty for a new one.

    Raises:
        UserError: the directory holds other things or rows of other settings, cannot be written, or
            another run is writing it.
    """
    is_new = not directory.exists()
    try:
        with locked_directory(directory, "distill"):
            remove_temporary_files(directory)
            yield _read_provenance(directory, made_from)
    finally:
        if is_new and directory.exists() and not any(directory.iterdir()):
            directory.rmdir()


def write_provenance(directory: Path, provenance: Mapping[str, Any]) -> None:
    """Write the file that says how the rows were made.

    Raises:
        UserError: it cannot be written.
    """
    write_json(directory / PROVENANCE_FILE, {"format": PROVENANCE_FORMAT, **provenance})


def _read_provenance(directory: Path, made_from: Mapping[str, Any]) -> dict[str, Any]:
    path = directory / PROVENANCE_FILE
    if not path.exists():
        if any(directory.iterdir()):
            raise UserError(
                f"{directory}: is not empty and no {PROVENANCE_FILE} says what it holds; name a "
                "new directory"
            )
        return {}
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
        is_ours = provenance["format"] == PROVENANCE_FORMAT
        earlier = _flatten(provenance["made_from"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UserError(f"{path}: cannot be read ({exc!r}); name a new directory") from None
    now = _flatten(made_from)
    different = [
        f"{name} was {earlier.get(name)!r}, is {now.get(name)!r}"
        for name in dict.fromkeys([*earlier, *now])
        if earlier.get(name) != now.get(name)
    ]
    if different or not is_ours:
        raise UserError(
            f"{directory}: holds rows made from something else ({'; '.join(different[:3])}); name "
            "a new directory, or remove this one"
        )
    return dict(provenance)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat
