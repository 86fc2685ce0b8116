"""The speculator: hidden states of the last accepted tokens -> heads -> the next trees.

The heads are some dozens of small kernels, which a host launches one by one more slowly than a GPU
runs them. So they run in CUDA graphs of their own, one for each number of requests, of vLLM's own
manager of graphs, as EAGLE's do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_medusa.plugin.worker.prefix import PrefixContext, PrefixPlaces
from vllm_medusa.plugin.worker.proposer import MedusaProposer
from vllm_medusa.plugin.worker.v2.draft_buffers import DraftBuffers
from vllm_medusa.plugin.worker.v2.prefix_rows import keep_rows
from vllm_medusa.plugin.worker.v2.shapes import BestFirst, FixedTrees, Shape
from vllm_medusa.plugin.worker.v2.states import TreeStates

if TYPE_CHECKING:
    from vllm_medusa.plugin.worker.v2.sampler import TreeSampler


class TreeSpeculator(BaseSpeculator):
    """Drafts one tree for every request of a batch.

    Attributes:
        tree: the static one.
        num_nodes: N, draft nodes of every tree.
        max_depth: of any tree.
        is_chain: whether all trees are chains.
        states: the trees that requests run next.
        sampler: whose acceptance the drafts go on from; set by the runner.
        cudagraph_manager: the heads' graphs; vLLM sets it to None after it has measured them.

    """

    supports_mm_inputs = False
    draft_logits = None

    sampler: TreeSampler

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any) -> None:
        self.proposer = MedusaProposer(vllm_config)
        config = self.proposer.config
        self._best_first: BestFirst | None = None
        if config.dynamic is not None:
            self._best_first = BestFirst(config, self.proposer.superset(), device)
        self.tree = config.tree if self._best_first is None else self._best_first.fixed_tree
        self.num_nodes = config.limits.max_nodes
        self.max_depth = self.tree.depth if self._best_first is None else self._best_first.max_depth
        self.is_chain = config.limits.max_paths == 1
        self.states = TreeStates.make(req_states.max_num_reqs, self.num_nodes + 1, device)
        self._usual = Shape.TREE if self._best_first is None else Shape.BEST_FIRST
        self._shapes = np.full(req_states.max_num_reqs, self._usual, dtype=np.int64)
        self._vllm_config = vllm_config
        self._device = device
        self.cudagraph_manager: CudaGraphManager | None = None
        model_config = vllm_config.model_config
        self._buffers = DraftBuffers.make(
            req_states.max_num_reqs,
            model_config.get_hidden_size(),
            self.num_nodes,
            0 if self._best_first is None else self.tree.num_draft_tokens,
            model_config.dtype,
            device,
        )
        self._fixed = FixedTrees(self.tree, self.num_nodes, device)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Choose the numbers of requests to capture: where decode steps run in full graphs."""
        is_full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if is_full else CUDAGraphMode.NONE
        # One row for each request is one query token for vLLM.
        self.cudagraph_manager = CudaGraphManager(
            self._vllm_config, self._device, mode, decode_query_len=1
        )

    def capture(self) -> None:
        """Capture the heads."""
        assert self.cudagraph_manager is not None

        def forward(desc: Any, warmup: bool) -> Callable[[CUDAGraphMode], None]:
            return lambda _: self._draft(desc.num_reqs)

        self.cudagraph_manager.capture(forward, "Capturing CUDA graphs of the heads")

    def load_model(self, target: torch.nn.Module) -> None:
        """Load the heads."""
        self.proposer.load_model(target)
        if self._best_first is not None:
            self._best_first.read_tables(by_parent=self.proposer.by_parent)

    def begin(self, state_index: int) -> None:
        """Forget what belonged to a state index, for a request that begins or begins anew."""
        if self.proposer.prefix is not None:
            self.proposer.prefix.forget(state_index)

    def set_shape(self, state_index: int, needs_chain: bool, has_grammar: bool) -> None:
        """Tell what the request of this state index may draft.

        Args:
            state_index: of the request.
            needs_chain: vLLM's own code has to follow its drafts as a chain.
            has_grammar: the engine core has to know the tree, so that it is a static one.

        """
        shape = Shape.CHAIN if needs_chain else Shape.TREE if has_grammar else self._usual
        self._shapes[state_index] = shape

    def parents_of(self, state_index: int) -> tuple[int, ...]:
        """Return the parents of the draft nodes of the request of this state index.

        Those of best-first trees are on the device alone; of them it returns nothing.
        """
        return self._fixed.parents_of(int(self._shapes[state_index]))

    @torch.inference_mode()
    def propose(
        self,
        input_batch: Any,
        attn_metadata: Any,
        slot_mappings: Any,
        last_hidden_states: Tensor,
        aux_hidden_states: Any,
        num_sampled: Any,
        num_rejected: Any,
        last_sampled: Tensor,
        next_prefill_tokens: Tensor,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Draft, and store the trees.

        Args:
            input_batch: the step's batch.
            attn_metadata: not used.
            slot_mappings: not used.
            last_hidden_states: [T, H] of all tokens of the step.
            aux_hidden_states: not used.
            num_sampled: [B] tokens that each request got; 0 for a chunk of a prompt.
            num_rejected: not used.
            last_sampled: the token that each state index's request sampled last.
            next_prefill_tokens: [any, R] the first is the prompt's next token of each state index.
            args: not used.
            dummy_run: the batch is made up, and so may the drafts be. All ranks skip the heads.
            kwargs: not used.

        Returns:
            [B, N] int64 draft tokens, in the order of the nodes.

        """
        if dummy_run:
            shape = (input_batch.num_reqs, self.num_nodes)
            return torch.zeros(shape, dtype=torch.int64, device=self._device)
        rows = input_batch.cu_num_logits[:-1]
        acceptance = self.sampler.acceptance
        if acceptance is not None:
            rows = rows + acceptance.path[:, -1]
        index = input_batch.idx_mapping
        num_reqs = self._buffers.read(
            last_hidden_states, input_batch.logits_indices[rows], last_sampled, index
        )
        if self.proposer.prefix is not None:
            sampled = last_sampled.flatten()[index]
            following = torch.where(num_sampled > 0, sampled, next_prefill_tokens[0][index])
            self._keep(self.proposer.prefix, input_batch, last_hidden_states, following)
        self._run_heads(num_reqs)
        parents, tokens = self._chosen(num_reqs, self._shapes[input_batch.idx_mapping_np])
        self.states.set_trees(parents, index)
        return tokens

    def _keep(
        self, prefix: PrefixContext, input_batch: Any, hidden_states: Tensor, following: Tensor
    ) -> None:
        """Keep what the step has verified, and buffer where the heads read it."""
        acceptance, num_reqs = self.sampler.acceptance, len(following)
        no_drafts = input_batch.cu_num_logits.new_zeros(num_reqs, 1)
        path = no_drafts if acceptance is None else acceptance.path
        self._buffers.places[:num_reqs] = input_batch.idx_mapping
        self._buffers.positions[:num_reqs] = keep_rows(
            prefix, input_batch, hidden_states, path, following
        )

    def _run_heads(self, num_reqs: int) -> None:
        """`_draft`, in a graph if there is one for as many requests or more."""
        manager = self.cudagraph_manager
        if manager is not None:
            desc = manager.dispatch(num_reqs, num_reqs, uniform_token_count=1, num_active_loras=0)
            if desc.cg_mode == CUDAGraphMode.FULL:
                manager.run_fullgraph(desc)
                return
        self._draft(num_reqs)

    def _draft(self, num_reqs: int) -> None:
        """Draft the usual trees for the buffers' first rows, into them.

        CUDA graphs capture it: it reads and writes nothing else that changes from step to step.
        """
        buffers, rows = self._buffers, slice(num_reqs)
        hidden_states, roots = buffers.hidden_states[rows], buffers.roots[rows]
        ends = PrefixPlaces(buffers.places[rows], buffers.positions[rows])
        if self._best_first is None:
            buffers.tokens[rows] = self.proposer.propose(hidden_states, roots, ends)
            return
        log_probs, guesses = self.proposer.probable_guesses(hidden_states, roots, ends)
        buffers.parents[rows], buffers.tokens[rows] = self._best_first.draft(log_probs, guesses)
        buffers.fixed_tokens[rows] = self._best_first.fixed_tokens(guesses)

    def _chosen(self, num_reqs: int, shapes: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """[B, N + 1] parents and [B, N] tokens for requests of [B] `Shape`s."""
        buffers, rows = self._buffers, slice(num_reqs)
        parents, tokens = buffers.parents[rows], buffers.tokens[rows]
        is_static = self._best_first is None
        if (shapes == self._usual).all():
            return self._fixed.whole(num_reqs) if is_static else parents, tokens
        wanted = torch.from_numpy(shapes).to(self._device, non_blocking=True)
        if is_static:
            return self._fixed.choose(wanted, tokens)
        fixed_parents, fixed_tokens = self._fixed.choose(wanted, buffers.fixed_tokens[rows])
        is_grown = (wanted == Shape.BEST_FIRST)[:, None]
        return (
            torch.where(is_grown, parents, fixed_parents),
            torch.where(is_grown, tokens, fixed_tokens),
        )
