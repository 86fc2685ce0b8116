"""The plugin's entry point: what is registered where.

vLLM calls `register` in every process (entry point group ``vllm.general_plugins``), often more
than once. What it patches, and where each patch lies upstream:

=========================================  =======================================================
`arguments.patch_arguments`                ``EngineArgs``: the ``medusa`` string and our keys
`v2_config.patch_v2_config`                ``VllmConfig``: Model Runner V2 knows our method
`sampling_params.patch_validation`         ``SamplingParams``: parameters that trees can honour
`memory.patch_engine_core`                 ``EngineCore``: fork blocks are taken off the KV cache
`structured_output.patch_...`              ``StructuredOutputManager``: grammars walk trees
`metrics.patch_metrics`                    ``Scheduler``, ``StatLoggerManager``: our counters
`logits_processors.patch_...`              the V1 runner, in our workers: ``min_p`` and its like
`merged_checkpoint.patch_model_loading`    model loaders, in our workers: heads beside the target
=========================================  =======================================================

Everything else hangs on the worker class that `arguments` names in ``parallel_config.worker_cls``
(`worker.py`). Without Medusa in the configuration every patch calls vLLM's own code.
"""

from __future__ import annotations

import contextlib
import sys

import torch

from vllm_medusa.errors import UserError
from vllm_medusa.plugin import compat


def register() -> None:
    """Make vLLM know ``medusa``; does nothing when called again in the same process."""
    from vllm_medusa.plugin import arguments, one_line_errors, sampling_params, v2_config
    from vllm_medusa.plugin.core import draft_parents, memory, structured_output

    one_line_errors.install_one_line_errors()
    if not compat.is_supported_version():
        # Leave it alone, but say so to who asks for Medusa, where its arguments still fit.
        with contextlib.suppress(UserError):
            arguments.patch_arguments()
        return
    _initialise_amx()
    arguments.patch_arguments()
    v2_config.patch_v2_config()
    sampling_params.patch_validation()
    # The engine core's module is slow to import, and only its own process needs the patch; where
    # the engine runs in this process, `arguments` applies it.
    if "vllm.v1.engine.core" in sys.modules:
        memory.patch_engine_core()
        structured_output.patch_structured_output()
        draft_parents.patch_scheduler()
        # It imports what it patches, which the engine core has imported by now.
        from vllm_medusa.plugin import metrics

        metrics.patch_metrics()


def _initialise_amx() -> None:
    """Ask the kernel for AMX in this process.

    vLLM's bfloat16 attention dies of SIGILL on AMX machines in worker processes that never asked.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
