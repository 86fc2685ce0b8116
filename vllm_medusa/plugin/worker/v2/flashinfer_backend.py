"""vLLM's FlashInfer backend with trees, by its kernels that find all lengths on the device.

These are the trtllm-gen kernels, for GPUs of compute capability 10. They run prompts and steps
without drafts, and of trees the context, as FlashAttention does (`flash_backend`). FlashInfer's
other kernels are planned on the host in each step, for which vLLM waits for the device.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import flashinfer
from vllm.v1.attention.backends.flashinfer import (
    FlashInferBackend,
    FlashInferImpl,
    FlashInferMetadataBuilder,
)

from vllm_medusa.plugin.compat import plugin_logger
from vllm_medusa.plugin.worker.v2.attention import TreeBuilderMixin, TreeImplMixin

logger = plugin_logger(__name__)

#: Queries of a request that the kernel keeps sums for at a time, the bytes of the sums of a query
#: and head, and of what else it keeps (``TrtllmDCPContextWrapper`` of vLLM 0.33).
_QUERIES, _SUM_BYTES, _OTHER_BYTES = 256, 8, 2**20


@dataclass
class Context:
    """The keys before the queries of B requests, all in persistent tensors.

    Attributes:
        query_start_loc: [B + 1] int32, first query of each request.
        lens: [B] int32, number of keys.
        block_table: [B, blocks] int32.
        block_size: tokens of a block.
        max_query_len: no request has more queries.
        max_len: no request has more keys.

    """

    query_start_loc: Tensor
    lens: Tensor
    block_table: Tensor
    block_size: int
    max_query_len: int
    max_len: int
    _block_starts: Tensor | None = None

    def block_starts(self) -> Tensor:
        """[B + 1] int32 sums of the requests' numbers of blocks.

        The first layer computes them, and a CUDA graph with them: when it is replayed, nothing
        tells us to build another context.
        """
        if self._block_starts is None:
            blocks = (self.lens + self.block_size - 1) // self.block_size
            ends = blocks.cumsum(0, dtype=torch.int32)
            self._block_starts = torch.nn.functional.pad(ends, (1, 0))
        return self._block_starts


class TreeFlashInferBuilder(TreeBuilderMixin, FlashInferMetadataBuilder):
    """Metadata of a step with trees."""

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = False
        # The FlashInfer of vLLM 0.32 may be older, and the user may have ruled this kernel out.
        signature = inspect.signature(flashinfer.trtllm_batch_context_with_kv_cache)
        self._attends_to_contexts = (
            "return_lse" in signature.parameters
            and flashinfer.can_use_trtllm_attention(
                self.num_qo_heads, self.num_kv_heads, is_prefill=True
            )
        )
        if not self._attends_to_contexts:
            logger.info_once("FlashInfer cannot attend to contexts of trees; the tree kernel does.")

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """All steps: in a graph the tree kernel runs every request."""
        return AttentionCGSupport.ALWAYS

    def _context_metadata(self, common: CommonAttentionMetadata) -> Context | None:
        assert self.buffers is not None
        if not self._attends_to_contexts:
            return None
        if not self._has_room(common):
            logger.warning_once(
                "VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE is too small for %d requests with trees; "
                "the tree kernel attends to their contexts. A larger one is faster.",
                common.num_reqs,
            )
            return None
        return Context(
            query_start_loc=common.query_start_loc,
            lens=self.buffers.context_lens[: common.num_reqs],
            block_table=common.block_table_tensor,
            block_size=self.page_size,
            max_query_len=common.max_query_len,
            max_len=common.max_seq_len,
        )

    def _has_room(self, common: CommonAttentionMetadata) -> bool:
        """Whether the kernel's own workspace has room for the sums of all queries."""
        queries = math.ceil(common.max_query_len / _QUERIES) * _QUERIES * common.num_reqs
        wanted = self.num_qo_heads * queries * _SUM_BYTES + _OTHER_BYTES
        return wanted <= flashinfer._get_trtllm_workspace_buffer().nbytes


class TreeFlashInferImpl(TreeImplMixin, FlashInferImpl):
    """One layer's attention."""

    def _attend_to_context(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, out: Tensor, context: Context
    ) -> Tensor | None:
        """Call the kernel as vLLM 0.33 does for a context (``TrtllmDCPContextWrapper``)."""
        if self.logits_soft_cap:  # the kernel has none
            return None
        query = canonicalize_singleton_dim_strides(query.contiguous())
        # The kernel writes nothing for a request without keys.
        out.zero_()
        lse = query.new_full(query.shape[:2], -math.inf, dtype=torch.float32)
        flashinfer.trtllm_batch_context_with_kv_cache(
            query=query,
            kv_cache=(
                canonicalize_singleton_dim_strides(key_cache.transpose(1, 2)),
                canonicalize_singleton_dim_strides(value_cache.transpose(1, 2)),
            ),
            workspace_buffer=flashinfer._get_trtllm_workspace_buffer(),
            block_tables=context.block_table,
            seq_lens=context.lens,
            max_q_len=context.max_query_len,
            max_kv_len=context.max_len,
            bmm1_scale=self.scale,
            bmm2_scale=1.0,
            batch_size=len(context.lens),
            cum_seq_lens_q=context.query_start_loc,
            cum_seq_lens_kv=context.block_starts(),
            causal=False,
            lse=lse,
            return_lse=True,
            out=out,
        )
        return lse.t() * math.log(2)  # the kernel's is to base 2


class TreeFlashInferBackend(FlashInferBackend):
    """``FLASHINFER`` with trees; quantised caches need `triton_backend`."""

    # Its kernels would need quantised queries too.
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]  # noqa: RUF012 - as vLLM has it

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """Whether it has the kernels that find lengths on the device."""
        return bool(capability.major == 10)

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Return why it cannot be used, and what can."""
        reasons: list[str] = super().validate_configuration(*args, **kwargs)
        remedy = "for trees it needs compute capability 10; use attention_backend='TRITON_ATTN'"
        return [*reasons, f"{remedy} or 'FLASH_ATTN', or tree='chain'"] if reasons else []

    @staticmethod
    def get_impl_cls() -> type[FlashInferImpl]:
        """The implementation."""
        return TreeFlashInferImpl

    @staticmethod
    def get_builder_cls() -> type[FlashInferMetadataBuilder]:
        """The builder of its metadata."""
        return TreeFlashInferBuilder
