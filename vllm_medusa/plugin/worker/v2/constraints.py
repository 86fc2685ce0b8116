"""Penalties and bad words of trees: vLLM's states, our kernels.

vLLM's own kernels use the rows before a row as its history, which is right for chains only. The
other processors of ``Sampler.apply_sampling_params`` depend only on a row or its position and are
unchanged.
"""

from __future__ import annotations

from functools import partial
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
            processor.apply = partial(_penalise, processor, states)
        elif isinstance(processor, BadWordsState):
            processor.apply = partial(_forbid, processor, states)


def _penalise(state: PenaltiesState, trees: TreeStates, logits: Tensor, ctx: Any) -> Tensor:
    """Replaces ``PenaltiesState.apply``."""
    if np.any(state.use_penalty[ctx.idx_mapping_np]):
        apply_penalties(
            logits,
            ctx.expanded_idx_mapping,
            ctx.expanded_local_pos,
            ctx.input_ids,
            trees.ancestors,
            state.repetition_penalty.gpu,
            state.frequency_penalty.gpu,
            state.presence_penalty.gpu,
            state.prompt_bin_mask,
            state.output_bin_counts,
        )
    return logits


def _forbid(state: BadWordsState, trees: TreeStates, logits: Tensor, ctx: Any) -> Tensor:
    """Replaces ``BadWordsState.apply``."""
    apply_bad_words(
        logits,
        ctx.expanded_idx_mapping,
        ctx.expanded_local_pos,
        ctx.input_ids,
        trees.ancestors,
        trees.depths,
        state.bad_word_token_ids.gpu,
        state.bad_word_offsets.gpu,
        state.num_bad_words.gpu,
        state.req_states.all_token_ids.gpu,
        state.req_states.prompt_len.gpu,
        state.req_states.total_len.gpu,
        int(state.num_bad_words.np[ctx.idx_mapping_np].max()),
    )
    return logits
