"""Lossless acceptance: each request's walk down its tree, on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_medusa.kernels.trees import draft_nodes


@triton.jit
def _accept_kernel(
    path_ptr,
    tokens_ptr,
    length_ptr,
    state_parents_ptr,
    state_stride,
    idx_mapping_ptr,
    base_ptr,
    draft_ptr,
    target_ptr,
    cu_num_logits_ptr,
    MAX_DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    req = tl.program_id(0)
    start, state, node, is_draft = draft_nodes(
        req, cu_num_logits_ptr, base_ptr, idx_mapping_ptr, state_stride, BLOCK
    )
    parent = tl.load(state_parents_ptr + state + node, mask=is_draft, other=-1)
    draft = tl.load(draft_ptr + start + node, mask=is_draft, other=-1).to(tl.int64)
    row = req * (MAX_DEPTH + 1)
    at = tl.zeros((), dtype=tl.int32)
    length = tl.zeros((), dtype=tl.int32)
    walks = start >= 0  # until no child agrees
    token = tl.load(target_ptr + start)
    tl.store(path_ptr + row, at)
    tl.store(tokens_ptr + row, token)
    for depth in range(1, MAX_DEPTH + 1):
        agrees = is_draft & (parent == at) & (draft == token)
        child = tl.min(tl.where(agrees, node, BLOCK), axis=0)
        walks = walks & (child < BLOCK)
        at = tl.where(walks, child, at)
        length += walks.to(tl.int32)
        token = tl.load(target_ptr + start + at)
        tl.store(path_ptr + row + depth, at)
        tl.store(tokens_ptr + row + depth, token)
    tl.store(length_ptr + req, length)


def accept(
    state_parents: Tensor,
    idx_mapping: Tensor,
    base: Tensor,
    draft_tokens: Tensor,
    target_tokens: Tensor,
    cu_num_logits: Tensor,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept, from the root on, the child that has the token taken from the target at its parent.

    If no child has it, this token is emitted and ends the step. If siblings have the same token,
    the first one counts. So every emitted token is a sample of the target.

    Args:
        state_parents: [R, N + 1] int64, parent of each node by state index.
        idx_mapping: [B] state index of each request.
        base: [>= B] int32, as `trees.prepare` writes it.
        draft_tokens: [L] token of each row's node, the roots' included.
        target_tokens: [L] int64, token taken from the target at each row.
        cu_num_logits: [B + 1] int32, first row of each request.
        max_depth: D, deeper nodes are not accepted.

    Returns:
        [B, D + 1] int32 nodes from the root to the last accepted one, which is then repeated; int64
        emitted tokens in the same places (after the last one they are arbitrary); [B] int32 number
        of accepted nodes.

    """
    num_reqs = idx_mapping.shape[0]
    path = torch.empty(num_reqs, max_depth + 1, dtype=torch.int32, device=target_tokens.device)
    tokens = torch.empty_like(path, dtype=torch.int64)
    length = path.new_empty(num_reqs)
    if num_reqs:
        _accept_kernel[(num_reqs,)](
            path,
            tokens,
            length,
            state_parents,
            state_parents.stride(0),
            idx_mapping,
            base,
            draft_tokens,
            target_tokens,
            cu_num_logits,
            MAX_DEPTH=max_depth,
            BLOCK=triton.next_power_of_2(state_parents.shape[1]),
            num_warps=1,
        )
    return path, tokens, length
