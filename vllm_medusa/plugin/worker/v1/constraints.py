"""Logits processing with each node's own history.

A request's parameters forbid or penalise tokens depending on its output so far. For a node this is
the request's output plus the tokens of the node's path, so each row is processed for its own path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor
from vllm._custom_ops import apply_repetition_penalties
from vllm.model_executor.layers.utils import get_token_bin_counts_and_mask
from vllm.v1.sample.logits_processor import (
    LogitBiasLogitsProcessor,
    LogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.penalties import _convert_to_tensors

from vllm_medusa.tree.rows import NodeRows

_FORBIDDEN = float("-inf")


class NodeConstraints:
    """Applies a batch's sampling constraints to the logits of all nodes of a step.

    Args:
        rows: rows of the logits.
        draft_tokens: [B, N] token of each draft node.
        outputs: the output tokens of each request so far; the lists that vLLM itself appends to.

    """

    def __init__(self, rows: NodeRows, draft_tokens: Tensor, outputs: Sequence[list[int]]) -> None:
        self._rows = rows
        self._draft_tokens = draft_tokens
        self._outputs = outputs

    def apply(self, logits: Tensor, sampling: SamplingMetadata) -> Tensor:
        """Apply everything that can change the most probable token, in vLLM's order.

        Follows ``Sampler.apply_logits_processors``.

        Args:
            logits: [R, V] float32, changed in place where possible.
            sampling: the requests' parameters.

        """
        processors = [p for p in sampling.logitsprocs.non_argmax_invariant if not _is_idle(p)]
        if (
            sampling.no_penalties
            and not sampling.bad_words_token_ids
            and sampling.allowed_token_ids_mask is None
            and not processors
        ):
            return logits
        rows = self._rows
        if sampling.allowed_token_ids_mask is not None:
            mask = sampling.allowed_token_ids_mask[: rows.num_requests]
            logits.masked_fill_(mask[rows.req], _FORBIDDEN)
        if sampling.bad_words_token_ids:
            self._apply_bad_words(logits, sampling.bad_words_token_ids)
        for processor in processors:
            logits = self._apply_processor(processor, logits)
        if not sampling.no_penalties:
            logits = self._apply_penalties(logits, sampling)
        return logits

    def apply_argmax_invariant(self, logits: Tensor, sampling: SamplingMetadata) -> Tensor:
        """Apply the processors that matter to random sampling only, after the temperature."""
        for processor in sampling.logitsprocs.argmax_invariant:
            if not _is_idle(processor):
                logits = self._apply_processor(processor, logits)
        return logits

    @cached_property
    def _path_tokens(self) -> Tensor:
        """[R, D] draft tokens of the path to each row's node, then -1."""
        rows = self._rows
        nodes = rows.ancestors[rows.req, rows.node][:, 1:]
        if not nodes.numel():
            return nodes
        tokens = self._draft_tokens[rows.req[:, None], (nodes - 1).clamp(min=0)]
        depths = torch.arange(1, rows.max_depth + 1, device=tokens.device)
        return tokens.where(depths <= rows.depth[:, None], -1)

    def _apply_penalties(self, logits: Tensor, sampling: SamplingMetadata) -> Tensor:
        """Follows vLLM's ``apply_penalties``, with the path's tokens counted for each row."""
        rows, path_tokens = self._rows, self._path_tokens
        vocab_size = logits.shape[1]
        num_requests = rows.num_requests
        _, prompt_mask = get_token_bin_counts_and_mask(
            sampling.prompt_token_ids[:num_requests], vocab_size, num_requests
        )
        outputs = _convert_to_tensors(self._outputs, vocab_size, logits.device)
        counts, _ = get_token_bin_counts_and_mask(outputs, vocab_size, num_requests)
        counts = counts[rows.req]
        on_path = (path_tokens >= 0).to(counts.dtype)
        counts.scatter_add_(1, path_tokens.clamp(min=0), on_path)
        mask = counts > 0
        apply_repetition_penalties(
            logits, prompt_mask[rows.req], mask, sampling.repetition_penalties[rows.req]
        )
        logits -= sampling.frequency_penalties[rows.req, None] * counts
        logits -= sampling.presence_penalties[rows.req, None] * mask
        return logits

    def _apply_bad_words(self, logits: Tensor, bad_words: dict[int, list[list[int]]]) -> None:
        """Forbid the last token of each bad word whose other tokens end the node's history."""
        rows, path_tokens = self._rows, self._path_tokens
        for req, words in bad_words.items():
            mine = slice(rows.starts[req], rows.starts[req + 1])
            longest = max(len(word) for word in words) - 1
            recent = self._recent_tokens(req, longest, rows.depth[mine], path_tokens[mine])
            for word in words:
                prefix = torch.tensor(word[:-1], dtype=torch.int64, device=logits.device)
                matches = (recent[:, longest - len(prefix) :] == prefix).all(dim=1)
                column = logits[mine, word[-1]]
                column.masked_fill_(matches, _FORBIDDEN)

    def _recent_tokens(self, req: int, count: int, depth: Tensor, path_tokens: Tensor) -> Tensor:
        """[rows, count] last tokens of each node's history; -1 before its beginning."""
        output = self._outputs[req][-count:] if count else []
        tail = torch.tensor(
            [-1] * (count - len(output)) + output, dtype=torch.int64, device=depth.device
        )
        history = torch.cat([tail.expand(len(depth), -1), path_tokens], dim=1)
        window = torch.arange(count, device=depth.device)
        return history.gather(1, depth[:, None] + window)

    def _apply_processor(self, processor: LogitsProcessor, logits: Tensor) -> Tensor:
        if isinstance(processor, MinTokensLogitsProcessor):
            return _apply_min_tokens(processor, logits, self._rows)
        if isinstance(processor, LogitBiasLogitsProcessor):
            return _apply_logit_bias(processor, logits, self._rows)
        if isinstance(processor, MinPLogitsProcessor):
            return _apply_min_p(processor, logits, self._rows)
        return self._apply_custom(processor, logits)

    def _apply_custom(self, processor: LogitsProcessor, logits: Tensor) -> Tensor:
        """Apply a processor of the user, whose interface has one row per request.

        It is called once per node with a batch of that node's rows. During the call the requests'
        output lists are extended by the node's path. The loop over nodes runs only if such a
        processor is loaded.
        """
        result = logits.clone()
        rows = self._rows
        path_of_row = self._path_tokens.tolist()
        for node in range(int(rows.row.shape[1])):
            present = (rows.num_drafts >= node).nonzero().flatten()
            if not len(present):
                break
            node_rows = rows.row[:, node]
            with self._extended_outputs(path_of_row, node_rows.tolist()):
                processed = processor.apply(logits[node_rows])
            result[node_rows[present]] = processed[present]
        return result

    @contextmanager
    def _extended_outputs(
        self, path_of_row: list[list[int]], node_rows: list[int]
    ) -> Iterator[None]:
        lengths = [len(output) for output in self._outputs]
        for output, row in zip(self._outputs, node_rows, strict=True):
            output.extend(token for token in path_of_row[row] if token >= 0)
        try:
            yield
        finally:
            for output, length in zip(self._outputs, lengths, strict=True):
                del output[length:]


def _is_idle(processor: LogitsProcessor) -> bool:
    """Whether one of vLLM's own processors has nothing to do for this batch."""
    if isinstance(processor, MinTokensLogitsProcessor):
        return not processor.min_toks
    if isinstance(processor, LogitBiasLogitsProcessor):
        return not processor.biases
    return isinstance(processor, MinPLogitsProcessor) and not processor.min_p_count


def _apply_min_tokens(
    processor: MinTokensLogitsProcessor, logits: Tensor, rows: NodeRows
) -> Tensor:
    """Forbid the stop tokens at the nodes whose output is still too short.

    As in ``MinTokensLogitsProcessor.apply``, a row of a structured output keeps its stop tokens if
    it would have no other token.
    """
    for req, (min_tokens, output, stop_ids, is_structured) in processor.min_toks.items():
        if not stop_ids:
            continue
        mine = slice(rows.starts[req], rows.starts[req + 1])
        too_short = len(output) + rows.depth[mine] < min_tokens
        columns = torch.tensor(sorted(stop_ids), device=logits.device)
        allowed = logits[mine]
        stops = allowed[:, columns]
        allowed[:, columns] = stops.masked_fill(too_short[:, None], _FORBIDDEN)
        if is_structured:
            stuck = too_short & torch.isneginf(allowed).all(dim=1)
            allowed[:, columns] = torch.where(stuck[:, None], stops, allowed[:, columns])
    return logits


def _apply_logit_bias(
    processor: LogitBiasLogitsProcessor, logits: Tensor, rows: NodeRows
) -> Tensor:
    for req, biases in processor.biases.items():
        columns = torch.tensor(list(biases), device=logits.device)
        bias = torch.tensor(list(biases.values()), dtype=logits.dtype, device=logits.device)
        logits[rows.starts[req] : rows.starts[req + 1], columns] += bias
    return logits


def _apply_min_p(processor: MinPLogitsProcessor, logits: Tensor, rows: NodeRows) -> Tensor:
    probs = logits.softmax(dim=-1)
    threshold = probs.amax(dim=-1, keepdim=True) * processor.min_p[rows.req]
    return logits.masked_fill_(probs < threshold, _FORBIDDEN)
