"""The speculator: hidden states of the last accepted tokens -> heads -> the next trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_medusa.plugin.worker.proposer import MedusaProposer
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
        self._device = device
        self._fixed = FixedTrees(self.tree, self.num_nodes, device)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """No graph of its own yet."""

    def capture(self) -> None:
        """No graph of its own yet."""

    def load_model(self, target: torch.nn.Module) -> None:
        """Load the heads."""
        self.proposer.load_model(target)
        if self._best_first is not None:
            self._best_first.read_tables(by_parent=self.proposer.by_parent)

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
            num_sampled: not used.
            num_rejected: not used.
            last_sampled: the token that each state index's request sampled last.
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
        parents, tokens = self._draft(
            last_hidden_states[input_batch.logits_indices[rows]],
            last_sampled.flatten()[index],
            self._shapes[input_batch.idx_mapping_np],
        )
        self.states.set_trees(parents, index)
        return tokens

    def _draft(
        self, hidden_states: Tensor, roots: Tensor, shapes: np.ndarray[Any, Any]
    ) -> tuple[Tensor, Tensor]:
        """[B, N + 1] parents and [B, N] tokens from [B, H] states, [B] roots and [B] `Shape`s."""
        is_usual = bool((shapes == self._usual).all())
        if self._best_first is None:
            grown = None
            tokens = self.proposer.propose(hidden_states, roots)
            if is_usual:
                return self._fixed.whole(len(tokens)), tokens
        else:
            log_probs, guesses = self.proposer.probable_guesses(hidden_states, roots)
            grown = self._best_first.draft(log_probs, guesses)
            if is_usual:
                return grown
            tokens = self._best_first.fixed_tokens(guesses)
        wanted = torch.from_numpy(shapes).to(self._device, non_blocking=True)
        parents, tokens = self._fixed.choose(wanted, tokens)
        if grown is None:
            return parents, tokens
        is_grown = (wanted == Shape.BEST_FIRST)[:, None]
        return torch.where(is_grown, grown[0], parents), torch.where(is_grown, grown[1], tokens)
