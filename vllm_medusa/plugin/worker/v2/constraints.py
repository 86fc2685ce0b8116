"""Penalties and bad words of trees: vLLM's states, our kernels.

vLLM's own kernels use the rows before a row as its history, which is right for chains only. The
other processors of ``Sampler.apply_sampling_params`` depend only on a row or its position and are
unchanged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState

from vllm_medusa.kernels.constraints import apply_bad_words, apply_penalties
from vllm_medusa.plugin.worker.v2.states import TreeStates


def follow_paths(sampler: Any, states: TreeStates) -> None:
    """Make a ``Sampler``'s penalties and bad words follow each node's own path."""
    for processor in sampler.logits_processors:
        if isinstance(processor, PenaltiesState):
            processor.apply = _Penalties(processor, states)
        elif isinstance(processor, BadWordsState):
            processor.apply = _BadWords(processor, states)


class _Penalties:
    """Replaces ``PenaltiesState.apply``."""

    def __init__(self, state: PenaltiesState, trees: TreeStates) -> None:
        self._state, self._trees = state, trees

    def __call__(self, logits: Tensor, ctx: Any) -> Tensor:
        state = self._state
        if np.any(state.use_penalty[ctx.idx_mapping_np]):
            apply_penalties(
                logits,
                ctx.expanded_idx_mapping,
                ctx.expanded_local_pos,
                ctx.input_ids,
                self._trees.ancestors,
                state.repetition_penalty.gpu,
                state.frequency_penalty.gpu,
                state.presence_penalty.gpu,
                state.prompt_bin_mask,
                state.output_bin_counts,
            )
        return logits


class _BadWords:
    """Replaces ``BadWordsState.apply``."""

    def __init__(self, state: BadWordsState, trees: TreeStates) -> None:
        self._state, self._trees = state, trees

    def __call__(self, logits: Tensor, ctx: Any) -> Tensor:
        state = self._state
        apply_bad_words(
            logits,
            ctx.expanded_idx_mapping,
            ctx.expanded_local_pos,
            ctx.input_ids,
            self._trees.ancestors,
            self._trees.depths,
            state.bad_word_token_ids.gpu,
            state.bad_word_offsets.gpu,
            state.num_bad_words.gpu,
            state.req_states.all_token_ids.gpu,
            state.req_states.prompt_len.gpu,
            state.req_states.total_len.gpu,
            int(state.num_bad_words.np[ctx.idx_mapping_np].max()),
        )
        return logits
