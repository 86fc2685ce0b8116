"""The speculator: hidden states of the last accepted tokens -> heads -> the next trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_medusa.plugin.worker.proposer import MedusaProposer
from vllm_medusa.plugin.worker.v2.states import TreeStates
from vllm_medusa.tree.draft_tree import DraftTree

if TYPE_CHECKING:
    from vllm_medusa.plugin.worker.v2.sampler import TreeSampler


class TreeSpeculator(BaseSpeculator):
    """Drafts one tree for every request of a batch.

    A request that vLLM's own code has to follow as a chain (`draft_chain`) gets the tree's first
    path, filled up with guesses that nobody accepts unless they are right.

    Attributes:
        states: the trees that requests run next.
        sampler: whose acceptance the drafts go on from; set by the runner.

    """

    supports_mm_inputs = False
    draft_logits = None

    sampler: TreeSampler

    def __init__(self, vllm_config: Any, device: torch.device, req_states: Any) -> None:
        self.proposer = MedusaProposer(vllm_config)
        self.tree = self.proposer.config.tree
        self.states = TreeStates.make(
            req_states.max_num_reqs, self.tree.num_draft_tokens + 1, device
        )
        self._is_chain = np.zeros(req_states.max_num_reqs, dtype=bool)
        self._device = device
        parents = [_tree_parents(self.tree), _chain_parents(self.tree)]
        self._kinds = [tuple(row[1:]) for row in parents]
        self._parents = _as_tensor(parents, device)
        self._sources = _as_tensor([_tree_sources(self.tree), _chain_sources(self.tree)], device)

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """No graph of its own yet."""

    def capture(self) -> None:
        """No graph of its own yet."""

    def load_model(self, target: torch.nn.Module) -> None:
        """Load the heads."""
        self.proposer.load_model(target)

    def draft_chain(self, state_index: int, is_chain: bool) -> None:
        """Tell whether the request of this state index may have a chain only."""
        self._is_chain[state_index] = is_chain

    def parents_of(self, state_index: int) -> tuple[int, ...]:
        """Return the parents of the draft nodes of the request of this state index."""
        return self._kinds[int(self._is_chain[state_index])]

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
        """Draft, and plant the trees.

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
            shape = (input_batch.num_reqs, self.tree.num_draft_tokens)
            return torch.zeros(shape, dtype=torch.int64, device=self._device)
        rows = input_batch.cu_num_logits[:-1]
        acceptance = self.sampler.acceptance
        if acceptance is not None:
            rows = rows + acceptance.path[:, -1]
        index = input_batch.idx_mapping
        tokens = self.proposer.propose(
            last_hidden_states[input_batch.logits_indices[rows]],
            last_sampled.flatten()[index],
        )
        is_chain = self._is_chain[input_batch.idx_mapping_np]
        if not is_chain.any():
            parents = self._parents[:1].expand(len(tokens), -1)
        else:
            kind = torch.from_numpy(is_chain.astype(np.int64)).to(self._device, non_blocking=True)
            parents, tokens = self._parents[kind], tokens.gather(1, self._sources[kind])
        self.states.plant(parents, index)
        return tokens


def _as_tensor(rows: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _tree_parents(tree: DraftTree) -> list[int]:
    return [0, *tree.parents[1:]]


def _chain_parents(tree: DraftTree) -> list[int]:
    return [0, *range(tree.num_draft_tokens)]


def _tree_sources(tree: DraftTree) -> list[int]:
    return list(range(tree.num_draft_tokens))


def _chain_sources(tree: DraftTree) -> list[int]:
    """Which node's token each node of the chain takes; behind the first path any will do."""
    first = [i for i, path in enumerate(tree.paths) if not any(path)]
    return first + [0] * (tree.num_draft_tokens - len(first))
