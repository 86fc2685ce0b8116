"""A target whose checkpoint also holds its heads: vLLM's model must not see their tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from vllm_medusa.heads.io.formats import is_heads_tensor
from vllm_medusa.plugin.identity import medusa_config_of


def wrap_create_model(original: Any) -> Any:
    """Hide the heads' tensors from the target if both are in one directory.

    vLLM's models refuse a tensor without a parameter for it. Every loader, also a reload, gives the
    tensors to the model's ``load_weights``. So this method is wrapped where the model is made:
    ``BaseModelLoader.create_model`` (``model_executor/model_loader/base_loader.py``).
    """

    def create_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        model = original(self, vllm_config, model_config, prefix)
        config = medusa_config_of(vllm_config)
        if config is not None and _is_same(config.heads, model_config.model):
            _leave_heads_out(model)
        return model

    return create_model


def _is_same(heads: str, model: str) -> bool:
    """Whether both name the same directory or the same repository of the hub."""
    return os.path.realpath(heads) == os.path.realpath(model)


def _leave_heads_out(model: Any) -> None:
    original = model.load_weights

    def load_weights(weights: Iterable[tuple[str, Any]]) -> Any:
        return original(pair for pair in weights if not is_heads_tensor(pair[0]))

    model.load_weights = load_weights
