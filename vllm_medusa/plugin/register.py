"""The plugin's entry point.

vLLM calls `register` in every process (entry point group ``vllm.general_plugins``), often more than
once. It patches functions that have no official extension point (`patches`). Everything else starts
from the worker class that `arguments` names in ``parallel_config.worker_cls`` (`worker.worker`).
"""

from __future__ import annotations

import contextlib
import sys

import torch

from vllm_medusa.errors import UserError
from vllm_medusa.plugin import compat, one_line_errors, patches


def register() -> None:
    """Add ``medusa`` to vLLM; further calls in the same process do nothing."""
    one_line_errors.install_one_line_errors()
    if not compat.is_supported_version():
        # Patch nothing else, but give users who ask for Medusa an error, if the arguments still
        # fit.
        for entry in patches.PATCHES["all"]:
            if entry.owner == "vllm.engine.arg_utils:EngineArgs":
                with contextlib.suppress(UserError):
                    entry.apply()
        return
    _initialise_amx()
    patches.apply("all")
    # The engine core's module is slow to import, and only its own process needs the patches; where
    # the engine runs in this process, `arguments` applies them.
    if "vllm.v1.engine.core" in sys.modules:
        patches.apply("front end")
        patches.apply("engine core")


def _initialise_amx() -> None:
    """Ask the kernel for AMX in this process.

    On machines with AMX, vLLM's bfloat16 attention ends with SIGILL in worker processes that did
    not ask (docs/vllm-bugs.md).
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
