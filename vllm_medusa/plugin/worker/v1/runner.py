"""One step of the engine with draft trees: our additions to vLLM's V1 model runner.

Read the methods in the order of a step: vLLM calls `_prepare_inputs`, builds the attention
metadata and runs the model (through `path_forks.PathForks`), calls `_sample` (which ends in
`sampler.TreeSampler`), then `_bookkeeping_sync` and `propose_draft_token_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_medusa.plugin import counters
from vllm_medusa.plugin.compat import plugin_logger
from vllm_medusa.plugin.core.draft_parents import send_parents
from vllm_medusa.plugin.fork_pool import fork_pool_of
from vllm_medusa.plugin.identity import masks_trees
from vllm_medusa.plugin.sampling_params import RequestOptions, typical_rule_of
from vllm_medusa.plugin.support import check_attention
from vllm_medusa.plugin.worker.proposer import MedusaProposer
from vllm_medusa.plugin.worker.v1.drafting import Drafter, DraftingBatch, StaticDrafter
from vllm_medusa.plugin.worker.v1.dynamic import DynamicDrafter
from vllm_medusa.plugin.worker.v1.path_forks import PathForks
from vllm_medusa.plugin.worker.v1.prefix_rows import PrefixRows
from vllm_medusa.plugin.worker.v1.sampler import TreeSampler
from vllm_medusa.plugin.worker.v1.step import Step, StepPlanner
from vllm_medusa.plugin.worker.v1.warm_up import step_costs
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.typical import TypicalBounds

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Base
else:
    _Base = object

logger = plugin_logger(__name__)


class MedusaRunnerMixin(_Base):
    """Draft trees for a V1 ``GPUModelRunner`` or a subclass of it (``CPUModelRunner``)."""

    drafter: MedusaProposer
    rejection_sampler: TreeSampler
    tree_drafter: Drafter
    forks: PathForks | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._layout = TreeLayout.build(self.drafter.config.tree, self.device)
        self.tree_drafter = StaticDrafter(self.drafter, self._layout)
        self.rejection_sampler = TreeSampler(self.sampler, self.device)
        self.masks_trees = masks_trees(self.vllm_config)
        self.counters = counters.Counters()
        self._planner = StepPlanner(self.device)
        self._step: Step
        self._parents: dict[str, tuple[int, ...]] = {}
        self._prefixes: PrefixRows | None = None

    def initialize_kv_cache(self, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        """Set up the forks, once the layers and their caches exist."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        is_profiling = kwargs.get("is_profiling", args[0] if args else False)
        if self.drafter.config.limits.max_paths == 1 or is_profiling:
            return
        tables = self.input_batch.block_table.block_tables
        check_attention(self.attn_groups, [table.block_size for table in tables])
        pool = fork_pool_of(self.kv_cache_config, self.drafter.config)
        layers = self.compilation_config.static_forward_context
        self.forks = PathForks(pool, self.attn_groups, layers, self.device)

    def prepare_drafting(self) -> None:
        """Give requests places for prefix attention, and measure step costs for dynamic trees."""
        if self.drafter.prefix is not None:
            self._prefixes = PrefixRows(self.drafter.prefix)
        if self.drafter.config.dynamic is not None:
            self.tree_drafter = DynamicDrafter(self.drafter, step_costs(self), self.counters)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        """Free the fork blocks and the data of finished and preempted requests."""
        # Sessions (`core.sessions`) that continue with more input; their text ends at another
        # place.
        continued = {
            new.req_id: self._num_left_out(new)
            for new in scheduler_output.scheduled_new_reqs
            if new.req_id in self.requests
        }
        preempted = scheduler_output.preempted_req_ids or set()
        ended = scheduler_output.finished_req_ids | preempted | continued.keys()
        if self.forks is not None:
            self.forks.grants.release(ended)
        if self._prefixes is not None:
            self._prefixes.forget(ended)
        for req_id in ended:
            self._parents.pop(req_id, None)
        self.tree_drafter.finish(scheduler_output.finished_req_ids | continued.keys())
        self.rejection_sampler.noise.give_back(continued)
        self.rejection_sampler.noise.forget(scheduler_output.finished_req_ids)
        return super()._update_states(scheduler_output)

    def _num_left_out(self, continued: NewRequestData) -> int:
        """Return how many accepted tokens the scheduler left out where it stopped a session."""
        request = self.requests[continued.req_id]
        # All the tokens that it kept are computed, except the last.
        num_kept = continued.num_computed_tokens + 1 - request.num_prompt_tokens
        return len(request.output_token_ids) - num_kept

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> Any:
        """Prepare the forks, and put the nodes at the positions of their depths."""
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self._step = step = self._make_step(scheduler_output, num_scheduled_tokens)
        self.rejection_sampler.step = step
        if self.forks is None:
            return prepared
        num_reqs = len(step.req_ids)
        computed = self.num_computed_tokens[:num_reqs]
        tables = self.input_batch.block_table.block_tables
        self.forks.begin_step(
            step, computed, [table.get_device_tensor(num_reqs) for table in tables]
        )
        if step.plan.forks is not None:
            indices = step.plan.forks.device
            positions = computed.index_select(0, indices.token_req) + indices.token_offset
            # In place, because compiled graphs read this buffer.
            self.positions[: positions.numel()].copy_(positions)
            self.counters.forked_requests += step.plan.forks.num_forked
            self.counters.fork_paths += step.plan.forks.num_forks
        return prepared

    def _make_step(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> Step:
        """Collect everything that is known about the step before it runs."""
        req_ids = self.input_batch.req_ids
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        drafts = [scheduled.get(req_id) or [] for req_id in req_ids]
        # The scheduler gives a new request that has one token left to compute as many placeholders
        # (-1) as others have drafts. They run as a chain; no target token is equal to one.
        are_real = [bool(tokens) and tokens[0] >= 0 for tokens in drafts]
        parents = [
            self._parents[req_id][: len(tokens)] if is_real else (0,) * len(tokens)
            for req_id, tokens, is_real in zip(req_ids, drafts, are_real, strict=True)
        ]
        num_reqs = len(req_ids)
        num_tokens = num_scheduled_tokens[:num_reqs].astype(np.int64)
        computed = self.input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64)
        return Step(
            req_ids=tuple(req_ids),
            outputs=self.input_batch.req_output_token_ids,
            discarded=frozenset(np.flatnonzero(self.discard_request_mask.np[:num_reqs]).tolist()),
            drafts=drafts,
            num_tokens=num_tokens,
            num_computed=computed,
            plan=self._planner.plan(
                num_tokens,
                parents,
                np.array(are_real, dtype=bool),
                None if self.forks is None else self.forks.num_mirrored(req_ids, computed),
            ),
            typical=self._typical_bounds(req_ids),
        )

    def _typical_bounds(self, req_ids: Sequence[str]) -> TypicalBounds | None:
        """Return the rules of typical acceptance; None if no request has one."""
        default = self.drafter.config.typical
        rules = [
            typical_rule_of(self.requests[req_id].sampling_params, default) for req_id in req_ids
        ]
        return TypicalBounds.make(rules, self.device) if any(rules) else None

    def _dummy_sampler_run(self, hidden_states: Tensor) -> Tensor:
        """Let vLLM profile the sampler, with a draft of one node for every request."""
        num_reqs = len(hidden_states)
        ones = np.ones(num_reqs, dtype=np.int64)
        self.rejection_sampler.step = Step(
            req_ids=(),
            outputs=[[] for _ in ones],
            discarded=frozenset(),
            drafts=[[0] for _ in ones],
            num_tokens=ones + 1,
            num_computed=0 * ones,
            plan=self._planner.plan(ones + 1, [(0,)] * num_reqs, ones > 0, None),
        )
        return super()._dummy_sampler_run(hidden_states)

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        if self.forks is not None:
            self.forks.end_step()
        return super()._dummy_run(*args, **kwargs)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Send the counts of this step with its output."""
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
        """Heads have no limit of context length, so every input fits."""
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
        self._count_acceptance(sampled_token_ids)
        if self.forks is not None:
            self.forks.note_committed(sampled_token_ids)
        ends = None
        if self._prefixes is not None:
            token_ids, path = self.input_batch.token_ids_cpu, self.rejection_sampler.acceptance.path
            ends = self._prefixes.keep(
                self._step, sampled_token_ids, token_ids, hidden_states, path
            )
        counts = spec_decode_metadata.cu_num_sampled_tokens
        roots = torch.nn.functional.pad(counts[:-1], (1, 0))
        last = sample_hidden_states.index_select(0, roots + self.rejection_sampler.acceptance.node)
        num_prompt_tokens = self.input_batch.num_prompt_tokens[: len(sampled_token_ids)]
        drafts = self.tree_drafter.draft(
            DraftingBatch(
                req_ids=self._step.req_ids,
                sampled=sampled_token_ids,
                texts=self._texts(),
                num_prompt_tokens=num_prompt_tokens.tolist(),
                hidden_states=last,
                ends=ends,
                max_paths=self._max_paths(sampled_token_ids),
                max_nodes=self._max_nodes(sampled_token_ids),
            )
        )
        for req_id, draft in zip(self._step.req_ids, drafts, strict=True):
            self._parents[req_id] = draft.parents
        return [draft.tokens for draft in drafts]

    def take_draft_token_ids(self) -> Any:
        """Send the parents of the drafts whose nodes the engine core masks by a grammar."""
        drafts = super().take_draft_token_ids()
        if drafts is not None:
            structured = [
                req_id
                for req_id in drafts.req_ids
                if (params := self.requests[req_id].sampling_params) and params.structured_outputs
            ]
            if structured:
                send_parents(drafts, {req_id: self._parents[req_id] for req_id in structured})
        return drafts

    def _texts(self) -> list[np.ndarray]:
        """Return each request's tokens so far; vLLM's bookkeeping has added the sampled ones."""
        lengths = self.input_batch.num_tokens_no_spec[: len(self._step.req_ids)].tolist()
        rows = self.input_batch.token_ids_cpu
        return [rows[index, :length] for index, length in enumerate(lengths)]

    def _max_paths(self, sampled_token_ids: list[list[int]]) -> list[int]:
        """Return the most fork paths of each request's next tree."""
        wanted = self.tree_drafter.num_paths(len(sampled_token_ids))
        if wanted == 1 or self.forks is None:
            return [1] * len(sampled_token_ids)
        max_paths = []
        for req_id, sampled in zip(self._step.req_ids, sampled_token_ids, strict=True):
            may_fork = bool(sampled) and self._may_fork(req_id)
            max_paths.append(wanted if may_fork else 1)
        return max_paths

    def _max_nodes(self, sampled_token_ids: list[list[int]]) -> list[int]:
        """Return the most draft nodes of each request's next tree."""
        limit = self.drafter.config.limits.max_nodes
        max_nodes = []
        for req_id, sampled in zip(self._step.req_ids, sampled_token_ids, strict=True):
            params = self.requests[req_id].sampling_params
            wanted = RequestOptions.of(params).max_nodes if sampled else 0
            max_nodes.append(limit if wanted is None else min(limit, wanted))
        return max_nodes

    def _may_fork(self, req_id: str) -> bool:
        """Give a request fork blocks if it can use them; return whether it has some."""
        assert self.forks is not None
        params = self.requests[req_id].sampling_params
        if params is not None and params.structured_outputs and not self.masks_trees:
            return False
        if self.forks.grants.acquire(req_id):
            return True
        self.counters.chain_fallbacks += 1
        logger.warning_once(
            "The fork blocks of all %d requests are in use: other requests draft only the tree's "
            "first path. Each additional one of max_tree_requests takes %d KV blocks from the "
            "scheduler.",
            self.forks.grants.num_places,
            self.forks.pool.blocks_per_request,
        )
        return False

    def _count_acceptance(self, sampled_token_ids: list[list[int]]) -> None:
        """Count the requests whose accepted path is not the first."""
        if self._step.plan.forks is None:
            return
        lengths = self._step.plan.first_path_lengths
        for drafts, sampled, length in zip(
            self._step.drafts, sampled_token_ids, lengths, strict=True
        ):
            accepted = sampled[:-1]
            if len(accepted) > length or accepted != drafts[: len(accepted)]:
                self.counters.forks_accepted += 1
