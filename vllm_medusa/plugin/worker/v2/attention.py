"""Attention in which requests with drafts go to the tree kernel, all others to vLLM's own backend.

vLLM's backends are unchanged: they keep cache layout, cache writes and quantisation, and run
prompts and steps without drafts. The mixins here extend such a backend (`triton_backend`,
`flash_backend`), whose cache is logically [blocks, heads, tokens, K | V].

Requests with drafts come first in a batch (``sort_batch_req_ids``), so a step is cut in two parts.
A step that a CUDA graph captures is not cut: there the tree kernel runs all requests, with causal
attention for those without a tree.

A backend whose kernel returns the log-sum-exp of the scores can attend to the keys before the
queries itself (`flash_backend`). Then the tree kernel goes on from there, over the keys of the
queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from vllm_medusa.kernels.attention import Features, Scales, Step, Workspace, tree_attention
from vllm_medusa.plugin.worker.v2.states import TreeBuffers

if TYPE_CHECKING:
    from vllm.v1.attention.backends.triton_attn import (
        TritonAttentionImpl as _Impl,
    )
    from vllm.v1.attention.backends.triton_attn import (
        TritonAttentionMetadataBuilder as _Builder,
    )
else:
    _Impl = _Builder = object

#: Pairs of query token and split that a layer's workspace holds.
WORKSPACE_ROWS = 2048
#: Programs for each multiprocessor of the device; the context is split until there are as many.
PROGRAMS_PER_PROCESSOR = 2


@dataclass
class TreeMetadata:
    """A step's attention metadata, of both parts.

    Attributes:
        num_actual_tokens: tokens of the step.
        num_tree_tokens: number of them, from the first, that the tree kernel runs.
        step: their queries and keys; None: there are none.
        workspace: memory for splits of the context.
        context: vLLM's own metadata of these queries and the keys before them; None: the tree
            kernel attends to these keys too.
        rest: vLLM's own metadata of the other requests; None: there are none.

    """

    num_actual_tokens: int
    num_tree_tokens: int
    step: Step | None
    workspace: Workspace
    context: Any
    rest: Any


class TreeBuilderMixin(_Builder):
    """Builds `TreeMetadata`; the runner gives it the buffers.

    Attributes:
        buffers: the tree data that attention reads.

    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_draft_decode_metadata_update = False
    supports_update_block_table = False
    buffers: TreeBuffers | None = None

    def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        num_heads = max(layers[name].impl.num_heads for name in layer_names)
        self._workspace = Workspace.make(
            WORKSPACE_ROWS, num_heads, kv_cache_spec.head_size, self.device
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> TreeMetadata:
        """Give the whole batch to the tree kernel: at replay any request can have a tree."""
        # A capture with real lengths would take long.
        common_attn_metadata.seq_lens.fill_(1)
        return self._metadata(common_attn_metadata, common_attn_metadata.num_reqs, None)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TreeMetadata:
        """Cut the batch after the last request with drafts."""
        common = common_attn_metadata
        assert self.buffers is not None
        wanted = self.buffers.num_tree_reqs
        if wanted is None or wanted >= common.num_reqs:
            return self._metadata(common, common.num_reqs, None)
        rest = _part(common, wanted, common.num_reqs)
        return self._metadata(common, wanted, super().build(0, rest, fast_build))

    def _context_metadata(self, common: CommonAttentionMetadata) -> Any:
        """`TreeMetadata.context` of a batch of requests that the tree kernel runs."""
        return None

    def _metadata(self, common: CommonAttentionMetadata, num_reqs: int, rest: Any) -> TreeMetadata:
        buffers = self.buffers
        assert buffers is not None
        if num_reqs == 0:
            return TreeMetadata(common.num_actual_tokens, 0, None, self._workspace, None, rest)
        part = _part(common, 0, num_reqs)
        step = Step(
            query_start_loc=part.query_start_loc,
            seq_lens=part.seq_lens,
            block_table=part.block_table_tensor,
            positions=buffers.positions,
            ancestors=buffers.ancestors,
            base=buffers.base,
            max_query_len=part.max_query_len,
        )
        return TreeMetadata(
            common.num_actual_tokens,
            part.num_actual_tokens,
            step,
            self._workspace,
            self._context_metadata(part),
            rest,
        )


def _part(common: CommonAttentionMetadata, begin: int, end: int) -> CommonAttentionMetadata:
    """Return the metadata of some requests of a batch; of the first ones it is views."""
    if begin == 0 and end == common.num_reqs:
        return common
    starts = common.query_start_loc_cpu[begin : end + 1]
    first, last = int(starts[0]), int(starts[-1])

    def requests(tensor: Any) -> Any:
        return None if tensor is None else tensor[begin:end]

    def from_zero(tensor: Tensor) -> Tensor:
        return tensor - first if begin else tensor

    return replace(
        common,
        query_start_loc=from_zero(common.query_start_loc[begin : end + 1]),
        query_start_loc_cpu=from_zero(starts),
        seq_lens=common.seq_lens[begin:end],
        num_reqs=end - begin,
        num_actual_tokens=last - first,
        max_query_len=int(starts.diff().max()),
        block_table_tensor=common.block_table_tensor[begin:end],
        slot_mapping=common.slot_mapping[first:last],
        positions=None if common.positions is None else common.positions[first:last],
        is_prefilling=requests(common.is_prefilling),
        seq_lens_cpu_upper_bound=requests(common.seq_lens_cpu_upper_bound),
        req_idx=requests(common.req_idx),
        rswa_prefix_lens=requests(common.rswa_prefix_lens),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class TreeImplMixin(_Impl):
    """Runs the tree kernel on the first tokens and vLLM's own implementation on the others."""

    _features: Features | None = None
    _wanted_programs = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The tree kernel needs queries in the model's number format.
        self.supports_quant_query_input = False

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Return false: the tree kernel writes the model's number format."""
        return False

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend; shapes and arguments are those of vLLM's ``AttentionImpl.forward``."""
        if attn_metadata is None:  # a profiling run
            return output.fill_(0)
        begin, end = attn_metadata.num_tree_tokens, attn_metadata.num_actual_tokens
        if attn_metadata.step is not None:
            self._attend_to_trees(layer, query[:begin], kv_cache, output[:begin], attn_metadata)
        if attn_metadata.rest is not None:
            super().forward(
                layer,
                query[begin:end],
                key[begin:end],
                value[begin:end],
                kv_cache,
                attn_metadata.rest,
                output[begin:end],
                output_scale,
                output_block_scale,
            )
        return output

    def _attend_to_trees(
        self, layer: Any, query: Tensor, kv_cache: Tensor, out: Tensor, metadata: TreeMetadata
    ) -> None:
        key_cache, value_cache = self._key_and_value(kv_cache)
        if self._features is None:
            self._features = self._layer_features(layer)
            self._wanted_programs = PROGRAMS_PER_PROCESSOR * _num_processors(query.device)
        out = out.view(query.shape)
        lse = None
        if metadata.context is not None and not self._features.needs_positions:
            lse = self._attend_to_context(query, key_cache, value_cache, out, metadata.context)
        assert metadata.step is not None
        tree_attention(
            query,
            key_cache,
            value_cache,
            out,
            metadata.step,
            self.scale,
            self._features,
            metadata.workspace,
            self._wanted_programs,
            lse,
        )

    def _attend_to_context(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, out: Tensor, context: Any
    ) -> Tensor | None:
        """Attend from each query to the keys before its request's queries.

        Args:
            query: [T, heads, head size].
            key_cache: [blocks, tokens of a block, KV heads, head size].
            value_cache: likewise.
            out: [T, heads, head size], written.
            context: `TreeMetadata.context`.

        Returns:
            [heads, T] float32 log-sum-exp of each query's scores; None: it cannot, and wrote
            nothing.

        """
        raise NotImplementedError

    def _key_and_value(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """[blocks, tokens of a block, heads, head size] keys and values of a layer's cache."""
        key, value = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        return key, value

    def _cache_scales(self, layer: Any) -> Scales | None:
        """Factors of a quantised cache."""
        return None

    def _layer_features(self, layer: Any) -> Features:
        slopes = self.alibi_slopes
        return Features(
            window=self.sliding_window[0] + 1,
            softcap=float(self.logits_soft_cap or 0),
            slopes=None if slopes is None else slopes.to(layer._k_scale.device),
            slopes_of_root=bool(getattr(self, "use_alibi_sqrt", False)),
            sinks=self.sinks,
            scales=self._cache_scales(layer),
        )


def _num_processors(device: torch.device) -> int:
    """Number of multiprocessors; the interpreter runs one program after the other."""
    if device.type == "cpu":
        return 1
    from vllm.platforms import current_platform

    return int(current_platform.num_compute_units())
