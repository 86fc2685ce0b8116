"""vLLM's FlashAttention backend with trees; it still runs prompts and steps without drafts."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_medusa.plugin.worker.v2.attention import TreeBuilderMixin, TreeImplMixin


class TreeFlashBuilder(TreeBuilderMixin, FlashAttentionMetadataBuilder):
    """Metadata of a step with trees."""


class TreeFlashImpl(TreeImplMixin, FlashAttentionImpl):
    """One layer's attention."""


class TreeFlashBackend(FlashAttentionBackend):
    """``FLASH_ATTN`` with trees; quantised caches need `triton_backend`."""

    # FlashAttention would need quantised queries too.
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012 - as vLLM has it

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The implementation."""
        return TreeFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """The builder of its metadata."""
        return TreeFlashBuilder
