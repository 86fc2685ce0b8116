"""Penalties and bad words of a node, by the node's own path.

vLLM's kernels (``v1/worker/gpu/sample/penalties.py`` and ``bad_words.py``) use the rows before a
row as its history. Here the history is the rows of its ancestors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

VOCAB_BLOCK = 4096


@triton.jit
def _penalties_kernel(
    logits_ptr, logits_stride, idx_mapping_ptr, local_pos_ptr, token_ids_ptr,
    state_ancestors_ptr, state_stride, repetition_ptr, frequency_ptr, presence_ptr,
    prompt_mask_ptr, prompt_mask_stride, counts_ptr, counts_stride, vocab_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    state = tl.load(idx_mapping_ptr + row).to(tl.int64)
    repetition = tl.load(repetition_ptr + state)
    frequency = tl.load(frequency_ptr + state)
    presence = tl.load(presence_ptr + state)
    if (repetition == 1.0) & (frequency == 0.0) & (presence == 0.0):
        return
    token = part * BLOCK + tl.arange(0, BLOCK)
    is_token = token < vocab_size
    counts = tl.load(counts_ptr + state * counts_stride + token, mask=is_token, other=0)
    node = tl.load(local_pos_ptr + row)
    ancestors = tl.load(state_ancestors_ptr + state * state_stride + node)
    for above in range(1, node + 1):
        drafted = tl.load(token_ids_ptr + row - node + above)
        counts += ((token == drafted) & (((ancestors >> above) & 1) == 1)).to(tl.int32)
    has_emitted = counts > 0
    word = part * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    packed = tl.load(
        prompt_mask_ptr + state * prompt_mask_stride + word,
        mask=word < tl.cdiv(vocab_size, 32), other=0,
    )  # fmt: skip
    in_prompt = ((packed[:, None] >> tl.arange(0, 32)[None, :]) & 1).reshape(BLOCK) == 1
    at = logits_ptr + row * logits_stride + token
    logits = tl.load(at, mask=is_token, other=0.0).to(tl.float32)
    factor = tl.where(in_prompt | has_emitted, repetition, 1.0)
    logits *= tl.where(logits > 0, 1.0 / factor, factor)
    logits -= frequency * counts
    logits -= presence * has_emitted
    tl.store(at, logits, mask=is_token)


def apply_penalties(
    logits: Tensor,
    idx_mapping: Tensor,
    local_pos: Tensor,
    token_ids: Tensor,
    state_ancestors: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    prompt_mask: Tensor,
    counts: Tensor,
) -> None:
    """Penalise, in place, the tokens of each row's history.

    Args:
        logits: [L, V] float32.
        idx_mapping: [L] state index of each row's request.
        local_pos: [L] each row's node.
        token_ids: [L] token of each row's node.
        state_ancestors: [R, N + 1] int64, as `trees.set_trees` writes them.
        repetition: [R] by state index; 1: none.
        frequency: [R] likewise; 0: none.
        presence: [R] likewise.
        prompt_mask: [R, V / 32] int32, bits of the tokens of each prompt.
        counts: [R, V] int32, how often each output has each token.

    """
    num_rows, vocab_size = logits.shape
    if num_rows:
        _penalties_kernel[(num_rows, triton.cdiv(vocab_size, VOCAB_BLOCK))](
            logits, logits.stride(0), idx_mapping, local_pos, token_ids, state_ancestors,
            state_ancestors.stride(0), repetition, frequency, presence, prompt_mask,
            prompt_mask.stride(0), counts, counts.stride(0), vocab_size, BLOCK=VOCAB_BLOCK,
        )  # fmt: skip


@triton.jit
def _token_above(token_ids_ptr, row, node, ancestors, steps_up):
    """Token of the ancestor this many steps above a node; 0: the node itself."""
    at = node
    for _ in range(steps_up):
        at -= 1
        while (at > 0) & (((ancestors >> at) & 1) == 0):
            at -= 1
    return tl.load(token_ids_ptr + row - node + at)


@triton.jit
def _bad_words_kernel(
    logits_ptr, logits_stride, idx_mapping_ptr, local_pos_ptr, token_ids_ptr,
    state_ancestors_ptr, state_depths_ptr, state_stride, words_ptr, words_stride,
    offsets_ptr, offsets_stride, num_words_ptr, all_token_ids_ptr, all_token_ids_stride,
    prompt_len_ptr, total_len_ptr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1)
    state = tl.load(idx_mapping_ptr + row).to(tl.int64)
    if word >= tl.load(num_words_ptr + state):
        return
    node = tl.load(local_pos_ptr + row)
    depth = tl.load(state_depths_ptr + state * state_stride + node).to(tl.int32)
    ancestors = tl.load(state_ancestors_ptr + state * state_stride + node)
    prompt_len = tl.load(prompt_len_ptr + state)
    num_output = tl.load(total_len_ptr + state) - prompt_len
    begin = tl.load(offsets_ptr + state * offsets_stride + word)
    end = tl.load(offsets_ptr + state * offsets_stride + word + 1)
    words = words_ptr + state * words_stride
    num_before = end - begin - 1
    if num_before > num_output + depth:
        return
    matches = 1
    for back in range(num_before):  # from the last token before the forbidden one backwards
        expected = tl.load(words + end - 2 - back)
        if back < depth:
            found = _token_above(token_ids_ptr, row, node, ancestors, back)
        else:
            at = prompt_len + num_output - 1 - (back - depth)
            found = tl.load(all_token_ids_ptr + state * all_token_ids_stride + at)
        matches = matches & (expected == found).to(tl.int32)
    if matches == 1:
        forbidden = tl.load(words + end - 1)
        tl.store(logits_ptr + row * logits_stride + forbidden, -float("inf"))


def apply_bad_words(
    logits: Tensor,
    idx_mapping: Tensor,
    local_pos: Tensor,
    token_ids: Tensor,
    state_ancestors: Tensor,
    state_depths: Tensor,
    words: Tensor,
    offsets: Tensor,
    num_words: Tensor,
    all_token_ids: Tensor,
    prompt_len: Tensor,
    total_len: Tensor,
    max_num_words: int,
) -> None:
    """Forbid, in place, the last token of each bad word whose other tokens end a row's history.

    Args:
        logits: [L, V] float32.
        idx_mapping: [L] state index of each row's request.
        local_pos: [L] each row's node.
        token_ids: [L] token of each row's node.
        state_ancestors: [R, N + 1] int64, as `trees.set_trees` writes them.
        state_depths: [R, N + 1] int64, likewise.
        words: [R, tokens] int32, the tokens of all bad words of each state.
        offsets: [R, words + 1] int32, where each word begins.
        num_words: [R] int32.
        all_token_ids: [R, tokens] int32, prompt and output of each state.
        prompt_len: [R] int32.
        total_len: [R] int32, tokens of prompt and output.
        max_num_words: most bad words of a request of the batch.

    """
    num_rows = logits.shape[0]
    if num_rows and max_num_words:
        _bad_words_kernel[(num_rows, max_num_words)](
            logits, logits.stride(0), idx_mapping, local_pos, token_ids, state_ancestors,
            state_depths, state_ancestors.stride(0), words, words.stride(0), offsets,
            offsets.stride(0), num_words, all_token_ids, all_token_ids.stride(0), prompt_len,
            total_len,
        )  # fmt: skip
