"""Logits processors with draft trees: the same as in vLLM without speculation."""

from __future__ import annotations

import copy
from typing import Any

from vllm_medusa.plugin.identity import is_medusa


def wrap_build_logitsprocs(original: Any) -> Any:
    """Load the processors that vLLM omits or refuses with speculative decoding.

    ``build_logitsprocs`` as the V1 runner calls it (``v1/worker/gpu_model_runner.py``);
    `constraints.NodeConstraints` applies them node by node.
    """

    def build_logitsprocs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if is_medusa(vllm_config.speculative_config):
            vllm_config = copy.copy(vllm_config)
            vllm_config.speculative_config = None
        return original(vllm_config, *args, **kwargs)

    return build_logitsprocs
