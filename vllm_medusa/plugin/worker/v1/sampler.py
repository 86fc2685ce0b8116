"""The tree sampler: one token from the target's processed distribution at every node.

It replaces vLLM's ``RejectionSampler`` (``v1/sample/rejection_sampler.py``). It processes the
logits in the same way and order as ``Sampler`` (``v1/sample/sampler.py``), so a node's distribution
is the one that vLLM would sample from if the node's path were the text.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import _SAMPLING_EPS, Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_medusa.plugin.worker.v1.constraints import NodeConstraints
from vllm_medusa.plugin.worker.v1.noise import PositionNoise
from vllm_medusa.plugin.worker.v1.step import Step
from vllm_medusa.tree.rows import NodeRows
from vllm_medusa.tree.typical import take_typical
from vllm_medusa.tree.verify import Acceptance, accept_lossless


class TreeSampler(RejectionSampler):
    """Samples at every node of every request's tree and accepts what agrees.

    Attributes:
        step: the current step; set by the runner before each step.
        acceptance: acceptance of the last step.

    """

    step: Step
    acceptance: Acceptance

    def __init__(self, sampler: Sampler, device: torch.device) -> None:
        super().__init__(sampler, None, device)
        self.noise = PositionNoise(self.use_fp64_gumbel)

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Return the emitted tokens, [B, max(D + 1, 2)] with -1 after the last, and logprobs.

        Args:
            metadata: the step's drafts, in the order of the tree's nodes.
            draft_probs: not used: Medusa's candidates are the top-k, not samples.
            logits: [R, V] target logits of every request's root and drafts; may be changed.
            sampling_metadata: the requests' sampling parameters.

        """
        rows = self.step.rows
        raw = logits.to(torch.float32)
        keep_raw = _wants_logprobs(sampling_metadata) and not self.is_processed_logprobs_mode
        processed = raw.clone() if keep_raw else raw
        if metadata.draft_token_ids.numel():
            draft_tokens = metadata.draft_token_ids.to(torch.int64)[rows.draft]
        else:
            draft_tokens = rows.draft
        constraints = NodeConstraints(rows, draft_tokens, self.step.outputs)
        processed = constraints.apply(processed, sampling_metadata)
        tokens, processed = self._sample(processed, rows, constraints, sampling_metadata)
        taken = tokens.to(torch.int64)[rows.row]
        if self.step.typical is not None and draft_tokens.numel():
            taken = take_typical(rows, taken, draft_tokens, processed, self.step.typical)
        acceptance = accept_lossless(rows, taken, draft_tokens)
        self.acceptance = acceptance
        generators = self._generators(sampling_metadata)
        self.noise.use(self.step.req_ids, generators, acceptance.length)
        return SamplerOutput(
            sampled_token_ids=acceptance.tokens.to(torch.int32),
            logprobs_tensors=self._logprobs(
                raw if keep_raw else processed, rows, acceptance, sampling_metadata
            ),
        )

    def _sample(
        self,
        logits: Tensor,
        rows: NodeRows,
        constraints: NodeConstraints,
        sampling: SamplingMetadata,
    ) -> tuple[Tensor, Tensor]:
        """Return [R] tokens and the logits they were taken from."""
        if not sampling.all_random:
            greedy = self.sampler.greedy_sample(logits)
            if sampling.all_greedy:
                return greedy, logits
        temperature = sampling.temperature[rows.req]
        logits = self.sampler.apply_temperature(logits, temperature, sampling.all_random)
        logits = constraints.apply_argmax_invariant(logits, sampling)
        top_k = None if sampling.top_k is None else sampling.top_k[rows.req]
        top_p = None if sampling.top_p is None else sampling.top_p[rows.req]
        logits = apply_top_k_top_p(logits, top_k, top_p)
        shape = (rows.num_requests, rows.max_depth + 1)
        draws = self.noise.draw(self.step.req_ids, shape, self._generators(sampling), logits)
        sampled = self.noise.sample(logits, draws[rows.req, rows.depth])
        if sampling.all_random:
            return sampled, logits
        is_greedy = temperature < _SAMPLING_EPS
        return torch.where(is_greedy, greedy, sampled.to(greedy.dtype)), logits

    def _generators(self, sampling: SamplingMetadata) -> dict[int, Generator]:
        discarded = self.step.discarded
        return {i: g for i, g in sampling.generators.items() if i not in discarded}

    def _logprobs(
        self, logits: Tensor, rows: NodeRows, acceptance: Acceptance, sampling: SamplingMetadata
    ) -> LogprobsTensors | None:
        """Return the logprobs at the accepted nodes, for all B * (D + 1) places of the output.

        ``parse_output`` removes those after the last token.
        """
        if not _wants_logprobs(sampling):
            return None
        at_nodes = logits[rows.row.gather(1, acceptance.path).flatten()]
        if not self.is_logits_logprobs_mode:
            at_nodes = self.sampler.compute_logprobs(at_nodes)
        tokens = acceptance.tokens.flatten().clamp(min=0)
        if sampling.logprob_token_ids:
            width = acceptance.tokens.shape[1]
            per_place = {
                index * width + place: token_ids
                for index, token_ids in sampling.logprob_token_ids.items()
                for place in range(width)
            }
            return self.sampler.gather_specific_token_logprobs(at_nodes, per_place, tokens)
        return self.sampler.gather_logprobs(at_nodes, sampling.max_num_logprobs, tokens)


def _wants_logprobs(sampling: SamplingMetadata) -> bool:
    return sampling.max_num_logprobs is not None or bool(sampling.logprob_token_ids)
