"""One step of the engine with draft trees: our additions to vLLM's Model Runner V2.

The hooks are in the order of a step. A request runs its root and N draft nodes as N + 1 scheduled
tokens; node ``i`` gets the slot ``computed + i`` from vLLM. The additions: positions and masks
(`prepare_attn`), attention (`attention.TreeImplMixin`), the walk down each tree and the compaction
of what it accepted (`sample`), and the next trees (`speculator.TreeSpeculator.propose`). None of
them waits for the device.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu import model_runner

from vllm_medusa.kernels.compact import CacheGroup, compact
from vllm_medusa.kernels.trees import prepare
from vllm_medusa.plugin.compat import plugin_logger, replaced
from vllm_medusa.plugin.core.draft_parents import send_parents
from vllm_medusa.plugin.counters import Counters
from vllm_medusa.plugin.identity import masks_trees
from vllm_medusa.plugin.sampling_params import RequestOptions, typical_rule_of
from vllm_medusa.plugin.worker.v2.attention import TreeBuilderMixin
from vllm_medusa.plugin.worker.v2.backends import check_layers, tree_backends
from vllm_medusa.plugin.worker.v2.constraints import follow_paths
from vllm_medusa.plugin.worker.v2.sampler import TreeSampler
from vllm_medusa.plugin.worker.v2.speculator import TreeSpeculator
from vllm_medusa.plugin.worker.v2.states import TreeBuffers

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Base
else:
    _Base = object

logger = plugin_logger(__name__)


class TreeRunnerMixin(_Base):
    """Draft trees for a V2 ``GPUModelRunner`` or a subclass of it."""

    speculator: TreeSpeculator
    rejection_sampler: TreeSampler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The runner makes its speculator by the name of the method, and does not know ours.
        with replaced(model_runner, "init_speculator", TreeSpeculator):
            super().__init__(*args, **kwargs)
        self.trees = TreeBuffers.make(self.input_buffers.positions, self.max_num_reqs)
        self.counters = Counters()
        self._cache_groups: list[CacheGroup] = []
        # By state index: the most drafts that the scheduler gets.
        self._max_nodes = [self.speculator.num_nodes] * self.max_num_reqs

    # Before the first step.

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Also load the heads, and set our sampler."""
        wanted = self.vllm_config.attention_config.backend
        with nullcontext() if self.speculator.is_chain else tree_backends(wanted):
            super().load_model(*args, **kwargs)
        self.speculator.load_model(self.model)
        states = self.speculator.states
        self.rejection_sampler = self.speculator.sampler = TreeSampler(
            self.sampler,
            self.speculative_config,
            self.device,
            states,
            self.trees,
            self.speculator.max_depth,
        )
        follow_paths(self.sampler, states)

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """Give the layers' attention its tree data, and find the caches."""
        super().initialize_kv_cache(*args, **kwargs)
        if self.speculator.is_chain:
            return  # every backend's causal attention is right, and nothing is moved
        check_layers(self.attn_groups)
        builders = [
            builder
            for groups in self.attn_groups
            for group in groups
            for builder in group.metadata_builders
        ]
        for builder in builders:
            assert isinstance(builder, TreeBuilderMixin)
            builder.buffers = self.trees
        self._cache_groups = self._find_caches()

    def _find_caches(self) -> list[CacheGroup]:
        layers = self.compilation_config.static_forward_context
        rows = [
            (layers[name].kv_cache, row)
            for row, group in enumerate(self.kv_cache_config.kv_cache_groups)
            for name in group.layer_names
        ]
        return CacheGroup.build([cache for cache, _ in rows], [row for _, row in rows])

    # A step.

    def add_requests(self, scheduler_output: Any) -> None:
        """Record which new requests can have only a chain."""
        super().add_requests(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            if new.sampling_params is not None:
                index = self.req_states.req_id_to_index[new.req_id]
                wanted = RequestOptions.of(new.sampling_params).max_nodes
                self._max_nodes[index] = self.speculator.num_nodes if wanted is None else wanted
                rule = typical_rule_of(new.sampling_params, self.speculator.proposer.config.typical)
                self.rejection_sampler.set_rule(index, rule)
                self.speculator.begin(index)
                self.speculator.set_shape(
                    index,
                    needs_chain=self._needs_chain(new.sampling_params),
                    has_grammar=new.sampling_params.structured_outputs is not None,
                )

    def _needs_chain(self, params: Any) -> bool:
        has_custom_processors = bool(self.model_config.logits_processors)
        has_chain_grammar = params.structured_outputs is not None and not masks_trees(
            self.vllm_config
        )
        return has_custom_processors or has_chain_grammar

    def prepare_attn(self, input_batch: Any) -> Any:
        """Put the nodes at the positions of their depths, once their slots are known."""
        prepared = super().prepare_attn(input_batch)
        drafts = input_batch.num_draft_tokens_per_req
        self.trees.num_tree_reqs = 0 if drafts is None else int((drafts > 0).sum())
        self._prepare_trees(input_batch)
        return prepared

    def _prepare_trees(self, input_batch: Any) -> None:
        states = self.speculator.states
        prepare(
            self.trees.positions,
            self.trees.ancestors,
            self.trees.base,
            self.trees.context_lens,
            states.depths,
            states.ancestors,
            input_batch.idx_mapping,
            input_batch.query_start_loc,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            self.req_states.prefill_len.gpu,
        )

    def prepare_dummy_attn(self, *args: Any, **kwargs: Any) -> Any:
        """Prepare a dummy step, in which no request has a tree."""
        self.trees.forget()
        return super().prepare_dummy_attn(*args, **kwargs)

    def capture_model(self, *args: Any, **kwargs: Any) -> Any:
        """Capture without trees; at replay the trees are in the buffers."""
        self.trees.forget()
        return super().capture_model(*args, **kwargs)

    def sample(self, hidden_states: Any, input_batch: Any, grammar_output: Any) -> Any:
        """Sample, accept, and move the accepted K/V before anything else reads the cache."""
        self.rejection_sampler.acceptance = None
        output = super().sample(hidden_states, input_batch, grammar_output)
        self._compact(input_batch)
        return output

    def take_draft_token_ids(self) -> Any:
        """Send the parents of the drafts too, for the grammars of the engine core.

        Synchronous scheduling runs all drafts that it gets here, so a request's own limit is
        applied here. For asynchronous scheduling see `core.max_nodes`.
        """
        drafts = super().take_draft_token_ids()
        if drafts is not None:
            index = self.req_states.req_id_to_index
            for req_id, tokens in zip(drafts.req_ids, drafts.draft_token_ids, strict=True):
                if req_id in index:
                    del tokens[self._max_nodes[index[req_id]] :]
            parents = {
                req_id: self.speculator.parents_of(index[req_id])
                for req_id in drafts.req_ids
                if req_id in index
            }
            send_parents(drafts, parents)
        return drafts

    def _compact(self, input_batch: Any) -> None:
        acceptance = self.rejection_sampler.acceptance
        if acceptance is not None:
            compact(
                self._cache_groups,
                self.block_tables.slot_mappings,
                input_batch.logits_indices,
                input_batch.cu_num_logits,
                acceptance.path,
                acceptance.length,
            )
