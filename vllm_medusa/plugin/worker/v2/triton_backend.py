"""vLLM's Triton backend with trees: every GPU, quantised caches, ALiBi and sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_medusa.kernels.attention import Scales
from vllm_medusa.plugin.worker.v2.attention import TreeBuilderMixin, TreeImplMixin


class TreeTritonBuilder(TreeBuilderMixin, TritonAttentionMetadataBuilder):
    """Metadata of a step with trees."""


class TreeTritonImpl(TreeImplMixin, TritonAttentionImpl):
    """One layer's attention."""

    def _key_and_value(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        if self._is_per_token_head_quant:
            key, value = self._pth_key_value_caches(kv_cache)
            return key, value
        key, value = super()._key_and_value(kv_cache)
        if self.kv_cache_dtype.startswith("fp8"):
            key, value = key.view(self.fp8_dtype), value.view(self.fp8_dtype)
        return key, value

    def _cache_scales(self, layer: Any) -> Scales | None:
        if self._is_per_token_head_quant:
            return Scales(self._k_scale_cache, self._v_scale_cache)
        if self.kv_cache_dtype.startswith("fp8"):
            return Scales(_vector(layer._k_scale), _vector(layer._v_scale))
        return None


class TreeTritonBackend(TritonAttentionBackend):
    """``TRITON_ATTN`` with trees."""

    # The packed INT4 cache has a kernel of its own in vLLM.
    supported_kv_cache_dtypes = [  # noqa: RUF012 - as vLLM has it
        dtype
        for dtype in TritonAttentionBackend.supported_kv_cache_dtypes
        if not dtype.startswith("int4")
    ]

    @staticmethod
    def get_impl_cls() -> type[TritonAttentionImpl]:
        """The implementation."""
        return TreeTritonImpl

    @staticmethod
    def get_builder_cls() -> type[TritonAttentionMetadataBuilder]:
        """The builder of its metadata."""
        return TreeTritonBuilder


def _vector(scale: torch.Tensor) -> torch.Tensor:
    return scale.reshape(1)
