"""The directory in which a training keeps its state until the heads are done.

It is beside the heads' directory, which appears only when it is complete. Every file in it is
written completely or not at all, and the checkpoint is written last. So a run that is killed at any
point continues from its last checkpoint, and nothing is missing.
"""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from vllm_medusa.errors import UserError
from vllm_medusa.files import locked_directory, remove_temporary_files, write_atomically, write_json
from vllm_medusa.training.settings import check_same

_IDENTITY = "settings.json"
_CHECKPOINT = "checkpoint.pt"
#: In the finished heads' directory: how they were made.
PROVENANCE = "provenance.json"


class RunDirectory:
    """Where one training keeps its state.

    Args:
        out: the heads' directory to make.

    Attributes:
        out: likewise.
        path: the directory of the state, `<out>.partial`.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")

    def is_finished(self, identity: dict[str, Any]) -> bool:
        """Tell whether the heads are already there.

        Args:
            identity: settings and fingerprints of this run.

        Raises:
            UserError: the heads' directory holds something else.
        """
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return False
        remedy = "name another directory or remove it"
        try:
            made = json.loads((self.out / PROVENANCE).read_text(encoding="utf-8"))["identity"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.out}: exists and was not made by vllm-medusa train; {remedy}"
            ) from None
        check_same(identity, made, str(self.out))
        return True

    def taken(self) -> AbstractContextManager[None]:
        """Take the directory for this run's main process, made if it is not there.

        Raises:
            UserError: it cannot be made, or another run has taken it.
        """
        return locked_directory(self.path, "train")

    def open(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Return the last checkpoint of the run that left the directory, if one did.

        Raises:
            UserError: the directory belongs to a run with other settings, its checkpoint cannot be
                read, or it cannot be written.
        """
        remove_temporary_files(self.path)
        left = self.path / _IDENTITY
        if left.exists():
            check_same(identity, json.loads(left.read_text(encoding="utf-8")), str(self.path))
        else:
            write_json(left, identity)
        return self._load(_CHECKPOINT) if (self.path / _CHECKPOINT).exists() else None

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint; files of best heads before its `best_step` are removed."""
        self._save(_CHECKPOINT, state)
        for path in self.path.glob("best-*.pt"):
            if path.name != _best(state["best_step"]):
                path.unlink()

    def save_best(self, step: int, heads: dict[str, Any]) -> None:
        """Keep the best heads so far; the next checkpoint names their step."""
        self._save(_best(step), heads)

    def load_best(self, step: int) -> dict[str, Any]:
        """Return the best heads."""
        return self._load(_best(step))

    def staging(self) -> Path:
        """Return the path of a directory, not there yet, for what `finish` gives its name."""
        path = self.path / "finished"
        shutil.rmtree(path, ignore_errors=True)
        return path

    def finish(self) -> None:
        """Give the staged directory its name and remove the state."""
        if self.out.exists():
            self.out.rmdir()  # `is_finished` saw it empty
        (self.path / "finished").rename(self.out)
        self.discard()

    def discard(self) -> None:
        """Remove the state."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _save(self, name: str, value: dict[str, Any]) -> None:
        write_atomically(self.path / name, lambda file: torch.save(value, file))

    def _load(self, name: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = torch.load(
                self.path / name, weights_only=True, map_location="cpu"
            )
        except Exception as exc:  # a damaged file can raise many kinds of errors
            raise UserError(
                f"{self.path / name}: is damaged ({type(exc).__name__}); remove {self.path} to "
                "train from the start"
            ) from None
        return value


def _best(step: int) -> str:
    return f"best-{step}.pt"
