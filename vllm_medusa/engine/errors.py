"""One line for a user's mistake, where Python would print a traceback of ours."""

from __future__ import annotations

import sys
from types import TracebackType

from vllm_medusa.config import ConfigError
from vllm_medusa.heads import HeadsError
from vllm_medusa.tree import TreeError

USER_ERRORS = (ConfigError, HeadsError, TreeError)


def install_one_line_errors() -> None:
    """Print uncaught errors of ours as one line; all others as before."""
    previous = sys.excepthook
    if getattr(previous, "_vllm_medusa", False):
        return

    def excepthook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, USER_ERRORS):
            sys.stderr.write(f"vllm_medusa: error: {error}\n")
        else:
            previous(kind, error, traceback)

    excepthook._vllm_medusa = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook
