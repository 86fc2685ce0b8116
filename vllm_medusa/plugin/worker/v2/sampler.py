"""The tree sampler: one token from the target at every node, then each request's walk.

vLLM's ``RejectionSampler`` (``v1/worker/gpu/spec_decode/rejection_sampler.py``) limits the memory
of the float32 logits by verifying requests in chunks, and computes logprobs. Both are kept; only
the verification of a chunk is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    get_max_chunk_logits,
)

from vllm_medusa.kernels.accept import accept
from vllm_medusa.kernels.typical import take_typical
from vllm_medusa.plugin.worker.v2.states import TreeBuffers, TreeStates
from vllm_medusa.tree.typical import TypicalBounds, TypicalRule


@dataclass(frozen=True)
class Acceptance:
    """The acceptance of a step.

    Attributes:
        path: [B, D + 1] int32, the accepted nodes by depth; then the last one is repeated.
        length: [B] int32, number of accepted nodes.

    """

    path: Tensor
    length: Tensor


class TreeSampler(RejectionSampler):
    """Samples at every node of every request's tree and accepts what agrees.

    Noise is a function of seed and position (`gumbel_sample`). Nodes of one depth share a position,
    so each node has the draw of plain decoding there, and seeded text is the same as without
    speculation.

    Attributes:
        acceptance: acceptance of this step; None if no request had drafts.

    """

    acceptance: Acceptance | None = None

    def __init__(
        self,
        sampler: Any,
        speculative_config: Any,
        device: torch.device,
        states: TreeStates,
        buffers: TreeBuffers,
        max_depth: int,
    ) -> None:
        super().__init__(sampler, speculative_config, device)
        self._states = states
        self._buffers = buffers
        self._max_depth = max_depth
        self._chunks: list[Acceptance] = []
        # By state index: the rules on the device, and on the host whether there is one.
        num_states = len(states.parents)
        self._typical = TypicalBounds.make([None] * num_states, device)
        self._is_typical = np.zeros(num_states, dtype=bool)

    def set_rule(self, state_index: int, rule: TypicalRule | None) -> None:
        """Give the request of a state index its rule of acceptance; None is lossless."""
        if rule is not None or self._is_typical[state_index]:
            self._is_typical[state_index] = rule is not None
            self._typical.set(state_index, rule)

    def __call__(
        self,
        logits: Tensor,
        input_batch: InputBatch,
        draft_logits: Tensor | None = None,
        invalid_drafts: Tensor | None = None,
    ) -> SamplerOutput:
        """Return the emitted tokens, [B, D + 1], their numbers, and logprobs.

        Args:
            logits: [L, V] target logits of every request's root and drafts.
            input_batch: the step's batch; positions are those of the trees.
            draft_logits: not used: the drafts are the heads' best guesses, not samples.
            invalid_drafts: not used: the mask at the parent forbids what a grammar forbids.

        """
        rows = input_batch.logits_indices
        self._chunks = []
        sampled, num_sampled, logprobs, _ = self._verify_in_chunks(
            logits,
            input_batch,
            None,
            input_batch.input_ids[rows],
            input_batch.positions[rows],
            get_max_chunk_logits(logits.shape[1]),
            self.sampler.sampling_states.max_num_logprobs(input_batch.idx_mapping_np),
        )
        self.acceptance = _joined(self._chunks)
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            num_sampled,
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=logprobs,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _verify(
        self,
        logits: Tensor,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,
        pos: Tensor,
        cu_num_logits: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: Tensor,
        expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sample and accept in one chunk of requests."""
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        targets = gumbel_sample(
            processed,
            expanded_idx_mapping,
            self.sampler.sampling_states.temperature.gpu,
            self.sampler.sampling_states.seeds.gpu,
            pos,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        first = sum(chunk.length.shape[0] for chunk in self._chunks)
        if self._is_typical[idx_mapping_np].any():
            rows = (expanded_idx_mapping, expanded_local_pos, idx_mapping, cu_num_logits)
            self._take_typical(targets, processed, draft_sampled, self._buffers.base[first:], *rows)
        path, tokens, length = accept(
            self._states.parents,
            idx_mapping,
            self._buffers.base[first:],
            draft_sampled,
            targets,
            cu_num_logits,
            self._max_depth,
        )
        self._chunks.append(Acceptance(path, length))
        return processed, tokens, length + 1

    def _take_typical(
        self,
        targets: Tensor,
        processed: Tensor,
        drafts: Tensor,
        base: Tensor,
        states: Tensor,
        nodes: Tensor,
        idx_mapping: Tensor,
        cu_num_logits: Tensor,
    ) -> None:
        """Put the best typical paths in place of the samples; of each row its state and node."""
        trees = self._states
        parents = trees.parents[states, nodes].clamp(min=0)
        at = torch.arange(len(targets), device=targets.device) - nodes + parents
        logprobs = processed.log_softmax(dim=-1)
        likelihoods = logprobs[at, drafts]
        take_typical(
            targets,
            (trees.parents, trees.depths, trees.ancestors),
            idx_mapping,
            base,
            drafts,
            likelihoods,
            likelihoods > self._typical.of_rows(logprobs, states)[at],
            cu_num_logits,
        )

    def _get_logprobs_tensors(
        self,
        sampled: Tensor,
        num_sampled: Tensor,
        logits: Tensor,
        cu_num_logits: Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> Any:
        """Put the accepted path's rows first in each request, where vLLM reads a chain's rows."""
        if max_num_logprobs == NO_LOGPROBS:
            return None
        path = self._chunks[-1].path
        req = torch.repeat_interleave(
            torch.arange(len(path), device=logits.device),
            cu_num_logits.diff(),
            output_size=logits.shape[0],
        )
        local = torch.arange(logits.shape[0], device=logits.device) - cu_num_logits[req]
        node = path[req, local.clamp(max=self._max_depth)]
        return super()._get_logprobs_tensors(
            sampled,
            num_sampled,
            logits[cu_num_logits[req] + node],
            cu_num_logits,
            cu_num_logits_np,
            max_num_logprobs,
        )


def _joined(chunks: list[Acceptance]) -> Acceptance:
    if len(chunks) == 1:
        return chunks[0]
    return Acceptance(
        torch.cat([chunk.path for chunk in chunks]), torch.cat([chunk.length for chunk in chunks])
    )
