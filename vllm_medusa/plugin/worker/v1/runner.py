"""One step of the engine with draft trees: what is added to vLLM's V1 model runner.

Read the methods in the order of a step: vLLM calls `_prepare_inputs`, builds the attention
metadata and runs the model (through `attention.PathForks`), calls `_sample` (which ends in
`sampler.TreeSampler`), then `_bookkeeping_sync` and `propose_draft_token_ids`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_medusa.plugin import counters
from vllm_medusa.plugin.compat import plugin_logger
from vllm_medusa.plugin.fork_pool import fork_pool_of
from vllm_medusa.plugin.identity import masks_trees
from vllm_medusa.plugin.support import check_attention
from vllm_medusa.plugin.worker.proposer import MedusaProposer
from vllm_medusa.plugin.worker.v1.path_forks import PathForks
from vllm_medusa.plugin.worker.v1.sampler import TreeSampler
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.schedule import nodes_for_batch

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:
    _Base = object

logger = plugin_logger(__name__)


class MedusaRunnerMixin(_Base):
    """Draft trees for a V1 ``GPUModelRunner`` or a subclass of it (``CPUModelRunner``)."""

    drafter: MedusaProposer
    rejection_sampler: TreeSampler
    forks: PathForks | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tree_layout = TreeLayout.build(self.drafter.config.tree, self.device)
        self.rejection_sampler = TreeSampler(self.sampler, self.tree_layout, self.device)
        self.masks_trees = masks_trees(self.vllm_config)
        self.counters = counters.Counters()

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """Wrap the attention seams once the layers and their caches exist."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        is_profiling = kwargs.get("is_profiling", args[0] if args else False)
        if self.tree_layout.tree.is_chain or is_profiling:
            return
        tables = self.input_batch.block_table.block_tables
        check_attention(self.attn_groups, [table.block_size for table in tables])
        pool = fork_pool_of(self.vllm_config, self.kv_cache_config, self.drafter.config)
        self.forks = PathForks(
            self.tree_layout,
            pool,
            self.attn_groups,
            self.compilation_config.static_forward_context,
            self.device,
        )

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        """Give back what finished and preempted requests held."""
        ended = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        if self.forks is not None:
            self.forks.slots.release(ended)
        self.rejection_sampler.noise.forget(scheduler_output.finished_req_ids)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> Any:
        """Prepare the forks, and put the nodes at the positions of their depths."""
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        num_reqs = self.input_batch.num_reqs
        self.rejection_sampler.begin_step(
            self.input_batch.req_ids,
            self.input_batch.req_output_token_ids,
            np.nonzero(self.discard_request_mask.np[:num_reqs])[0].tolist(),
        )
        if self.forks is None:
            return prepared
        drafts = scheduler_output.scheduled_spec_decode_tokens
        tables = self.input_batch.block_table.block_tables
        shape = self.forks.begin_step(
            self.input_batch.req_ids,
            tuple(num_scheduled_tokens.tolist()),
            tuple(_num_drafts(drafts.get(req_id)) for req_id in self.input_batch.req_ids),
            self.num_computed_tokens[:num_reqs],
            self.input_batch.num_computed_tokens_cpu[:num_reqs].tolist(),
            [table.get_device_tensor(num_reqs) for table in tables],
        )
        if shape is not None:
            computed = self.num_computed_tokens[:num_reqs].to(torch.int64)
            positions = computed.index_select(0, shape.token_req) + shape.token_offset
            # In place: compiled graphs read this very buffer.
            self.positions[: positions.numel()].copy_(positions)
            self.counters.forked_requests += shape.forked_reqs.numel()
            self.counters.fork_paths += shape.fork_seqs.numel()
        return prepared

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        if self.forks is not None:
            self.forks.end_step()
        return super()._dummy_run(*args, **kwargs)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Send what this step counted along with its output."""
        output = super().sample_tokens(grammar_output)
        if increase := self.counters.take_increase():
            setattr(output, counters.OUTPUT_ATTRIBUTE, increase)
        return output

    def _sample(
        self, logits: Tensor | None, spec_decode_metadata: SpecDecodeMetadata | None
    ) -> SamplerOutput:
        """Verify the trees, then commit the accepted paths."""
        output = super()._sample(logits, spec_decode_metadata)
        if self.forks is not None:
            self.forks.commit(self.rejection_sampler.acceptance)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """Run vLLM's bookkeeping without its rewinding of generators.

        vLLM draws a sample for every chunk of a prompt and then rewinds the request's generator
        by that draw. `PositionNoise` does not draw for them.
        """
        generators = self.input_batch.generators
        held_back = {
            index: generators.pop(index)
            for index in np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0]
            if index in generators
        }
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(held_back)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        """Heads have no context of their own that a long request could outgrow."""
        return common_attn_metadata is not None

    def propose_draft_token_ids(
        self,
        scheduler_output: SchedulerOutput,
        sampled_token_ids: list[list[int]],
        sampling_metadata: Any,
        hidden_states: Tensor,
        sample_hidden_states: Tensor,
        aux_hidden_states: Any,
        spec_decode_metadata: SpecDecodeMetadata,
        *args: Any,
    ) -> list[list[int]]:
        """Draft the next step's trees, for the requests that sampled a token in this one."""
        acceptance = self.rejection_sampler.acceptance
        self._count_acceptance(acceptance.node.tolist(), spec_decode_metadata.num_draft_tokens)
        # Not by vLLM's own lookup, which 0.33 has for its V2 runner only.
        sizes = self.drafter.config.sizes_by_batch
        num_nodes = nodes_for_batch(sizes, len(sampled_token_ids)) if sizes else None
        if num_nodes == 0 or not any(sampled_token_ids):
            return [[] for _ in sampled_token_ids]
        counts = spec_decode_metadata.cu_num_sampled_tokens
        roots = torch.nn.functional.pad(counts[:-1], (1, 0))
        last = sample_hidden_states.index_select(0, roots + acceptance.node)
        drafts = self._draft(last, sampled_token_ids)[:, :num_nodes].tolist()
        return [
            self._fit_drafts(index, tokens, draft)
            for index, (tokens, draft) in enumerate(zip(sampled_token_ids, drafts, strict=True))
        ]

    def _draft(self, hidden_states: Tensor, sampled_token_ids: list[list[int]]) -> Tensor:
        """Return [B, N] drafts; tests put other sources of drafts here."""
        return self.drafter.propose(hidden_states)

    def _fit_drafts(self, index: int, sampled: list[int], draft: list[int]) -> list[int]:
        """Return as much of a request's tree as it can have verified in the next step."""
        if not sampled:
            return []
        if self.forks is None:
            return draft
        req_id = self.input_batch.req_ids[index]
        held = self.forks.slots
        computed = int(self.input_batch.num_computed_tokens_cpu[index]) + len(sampled)
        if num_paths := self.forks.num_paths(index):
            held.set_mirrored(req_id, computed, num_paths)
        if len(draft) <= self.tree_layout.first_path_length:
            return draft
        params = self.requests[req_id].sampling_params
        if params is not None and params.structured_outputs and not self.masks_trees:
            return draft[: self.tree_layout.first_path_length]
        if not held.acquire(req_id):
            self.counters.chain_fallbacks += 1
            logger.warning_once(
                "All %d requests' fork blocks are in use: further requests draft the tree's first "
                "path only. Raise max_tree_requests to give trees more of the KV cache.",
                held.num_slots,
            )
            return draft[: self.tree_layout.first_path_length]
        return draft

    def _count_acceptance(self, nodes: list[int], num_draft_tokens: list[int]) -> None:
        node_path = self.tree_layout.node_path.tolist()
        for node, num_drafts in zip(nodes, num_draft_tokens, strict=True):
            if num_drafts and node_path[node] > 0:
                self.counters.commits += 1


def _num_drafts(draft_token_ids: list[int] | None) -> int:
    """Return how many drafts a request verifies; placeholders are none.

    The scheduler gives a new request that has one token left to compute as many placeholders (-1)
    as others have drafts. They are run as so many tokens in a row, and no target token equals one.
    """
    if not draft_token_ids or draft_token_ids[0] < 0:
        return 0
    return len(draft_token_ids)
