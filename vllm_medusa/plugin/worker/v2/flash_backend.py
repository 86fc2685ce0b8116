"""vLLM's FlashAttention backend with trees.

FlashAttention runs prompts and steps without drafts, and of trees the context: all queries of a
tree see all of it, so that no mask is needed. The tree kernel runs the rest of a tree, the keys of
its own nodes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_medusa.plugin.worker.v2.attention import TreeBuilderMixin, TreeImplMixin


class TreeFlashBuilder(TreeBuilderMixin, FlashAttentionMetadataBuilder):
    """Metadata of a step with trees."""

    def _context_metadata(self, common: CommonAttentionMetadata) -> Any:
        assert self.buffers is not None
        lens = self.buffers.context_lens[: common.num_reqs]
        # vLLM replays a graph without saying so here. The schedule of a fast build is made by
        # FlashAttention itself, in the graph, of the lengths that it finds there.
        return FlashAttentionMetadataBuilder.build(
            self, 0, replace(common, seq_lens=lens, causal=False), fast_build=True
        )


class TreeFlashImpl(TreeImplMixin, FlashAttentionImpl):
    """One layer's attention."""

    def _attend_to_context(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, out: Tensor, context: Any
    ) -> Tensor | None:
        """Call FlashAttention as vLLM's ``_forward_with_dcp`` does."""
        if self.fa4_hd256:  # takes whole pages only
            return None
        _, lse = flash_attn.flash_attn_varlen_func(
            q=query,
            k=canonicalize_singleton_dim_strides(key_cache),
            v=canonicalize_singleton_dim_strides(value_cache),
            out=out,
            cu_seqlens_q=context.query_start_loc,
            max_seqlen_q=context.max_query_len,
            seqused_k=context.seq_lens,
            max_seqlen_k=context.max_seq_len,
            softmax_scale=self.scale,
            causal=False,
            softcap=self.logits_soft_cap,
            block_table=context.block_table,
            return_softmax_lse=True,
            fa_version=self.vllm_flash_attn_version,
            num_splits=context.max_num_splits,
        )
        return lse


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
