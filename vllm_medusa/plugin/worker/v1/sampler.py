"""The tree sampler: one token from the target's processed distribution at every node.

It stands where vLLM has its ``RejectionSampler`` (``v1/sample/rejection_sampler.py``) and follows
``Sampler`` (``v1/sample/sampler.py``) in what it does to the logits and in which order, so that a
node's distribution is the one that vLLM would sample from had it arrived there by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import _SAMPLING_EPS, Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_medusa.plugin.worker.v1.constraints import NodeConstraints
from vllm_medusa.plugin.worker.v1.node_rows import NodeRows, NodeRowsCache
from vllm_medusa.plugin.worker.v1.noise import PositionNoise
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.verify import Acceptance, accept_lossless


class TreeSampler(RejectionSampler):
    """Samples at every node of every request's tree and accepts what agrees.

    Attributes:
        acceptance: what the last step accepted.

    """

    acceptance: Acceptance

    def __init__(self, sampler: Sampler, layout: TreeLayout, device: torch.device) -> None:
        super().__init__(sampler, None, device)
        self._layout = layout
        self._rows = NodeRowsCache(layout, device)
        self._constraints = NodeConstraints(layout)
        self.noise = PositionNoise(layout.depth + 1, self.use_fp64_gumbel)
        self._req_ids: Sequence[str] = ()
        self._discarded: frozenset[int] = frozenset()

    def begin_step(
        self, req_ids: Sequence[str], outputs: Sequence[list[int]], discarded: Sequence[int]
    ) -> None:
        """Tell the sampler whose logits come next.

        Args:
            req_ids: the batch's requests.
            outputs: the output tokens of each, so far; the lists that vLLM itself appends to.
            discarded: indices of those whose sample will be thrown away (chunks of a prompt).

        """
        self._req_ids = req_ids
        self._discarded = frozenset(discarded)
        self._constraints.begin_step(outputs)

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Return the emitted tokens, [B, max(D + 1, 2)] with -1 behind the last, and logprobs.

        Args:
            metadata: the step's drafts, in the order of the tree's nodes.
            draft_probs: not used: Medusa's candidates are the top-k, not samples.
            logits: [R, V] target logits of every request's root and drafts; may be changed.
            sampling_metadata: the requests' sampling parameters.

        """
        rows = self._rows.get(tuple(metadata.num_draft_tokens))
        raw = logits.to(torch.float32)
        keep_raw = _wants_logprobs(sampling_metadata) and not self.is_processed_logprobs_mode
        processed = raw.clone() if keep_raw else raw
        if metadata.draft_token_ids.numel():
            draft_tokens = metadata.draft_token_ids.to(torch.int64)[rows.draft]
        else:
            draft_tokens = rows.draft
        processed = self._constraints.apply(processed, rows, draft_tokens, sampling_metadata)
        tokens, processed = self._sample(processed, rows, draft_tokens, sampling_metadata)
        acceptance = accept_lossless(
            self._layout, tokens.to(torch.int64)[rows.row], draft_tokens, rows.num_draft_tokens
        )
        self.acceptance = acceptance
        self.noise.use(self._req_ids, self._generators(sampling_metadata), acceptance.length)
        return SamplerOutput(
            sampled_token_ids=acceptance.tokens.to(torch.int32),
            logprobs_tensors=self._logprobs(
                raw if keep_raw else processed, rows, acceptance, sampling_metadata
            ),
        )

    def _sample(
        self, logits: Tensor, rows: NodeRows, draft_tokens: Tensor, sampling: SamplingMetadata
    ) -> tuple[Tensor, Tensor]:
        """Return [R] tokens and the logits they were taken from."""
        if not sampling.all_random:
            greedy = self.sampler.greedy_sample(logits)
            if sampling.all_greedy:
                return greedy, logits
        temperature = sampling.temperature[rows.req]
        logits = self.sampler.apply_temperature(logits, temperature, sampling.all_random)
        logits = self._constraints.apply_argmax_invariant(logits, rows, draft_tokens, sampling)
        top_k = None if sampling.top_k is None else sampling.top_k[rows.req]
        top_p = None if sampling.top_p is None else sampling.top_p[rows.req]
        logits = apply_top_k_top_p(logits, top_k, top_p)
        draws = self.noise.draw(
            self._req_ids, rows.num_requests, self._generators(sampling), logits
        )
        sampled = self.noise.sample(logits, draws[rows.req, rows.depth])
        if sampling.all_random:
            return sampled, logits
        is_greedy = temperature < _SAMPLING_EPS
        return torch.where(is_greedy, greedy, sampled.to(greedy.dtype)), logits

    def _generators(self, sampling: SamplingMetadata) -> dict[int, Generator]:
        if not self._discarded:
            return sampling.generators
        return {i: g for i, g in sampling.generators.items() if i not in self._discarded}

    def _logprobs(
        self, logits: Tensor, rows: NodeRows, acceptance: Acceptance, sampling: SamplingMetadata
    ) -> LogprobsTensors | None:
        """Return the logprobs at the accepted nodes, for all B * (D + 1) places of the output.

        Those behind the last token are filtered out by ``parse_output``.
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
