"""Typical acceptance: each request's best typical path, on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_medusa.kernels.trees import draft_nodes


@triton.jit
def _typical_kernel(
    target_ptr,
    state_parents_ptr,
    state_depths_ptr,
    state_ancestors_ptr,
    state_stride,
    idx_mapping_ptr,
    base_ptr,
    draft_ptr,
    likelihood_ptr,
    is_typical_ptr,
    cu_num_logits_ptr,
    BLOCK: tl.constexpr,
):
    req = tl.program_id(0)
    start, state, node, is_draft = draft_nodes(
        req, cu_num_logits_ptr, base_ptr, idx_mapping_ptr, state_stride, BLOCK
    )
    parent = tl.load(state_parents_ptr + state + node, mask=is_draft, other=-1)
    depth = tl.load(state_depths_ptr + state + node, mask=is_draft, other=0)
    seen = tl.load(state_ancestors_ptr + state + node, mask=is_draft, other=0)
    likelihood = tl.load(likelihood_ptr + start + node, mask=is_draft, other=0.0)
    is_typical = tl.load(is_typical_ptr + start + node, mask=is_draft, other=0) != 0
    counts = (node == 0) | (is_draft & is_typical & (parent >= 0))
    bit = tl.full([BLOCK], 1, dtype=tl.int64) << node.to(tl.int64)
    missing = ~tl.sum(tl.where(counts, bit, 0), axis=0)
    counts = is_draft & ((seen & missing) == 0)
    longest = tl.max(tl.where(counts, depth, 0), axis=0)
    is_above = (seen[:, None] & bit[None, :]) != 0
    total = tl.sum(tl.where(is_above, likelihood[None, :], 0.0), axis=1)
    total = tl.where(counts & (depth == longest), total, float("-inf"))
    best = tl.argmax(total, axis=0)
    way = tl.sum(tl.where((node == best) & counts, seen, 0), axis=0)
    is_step = is_draft & ((way & bit) != 0)
    draft = tl.load(draft_ptr + start + node, mask=is_step, other=0).to(tl.int64)
    tl.store(target_ptr + start + parent, draft, mask=is_step)


def take_typical(
    target_tokens: Tensor,
    states: tuple[Tensor, Tensor, Tensor],
    idx_mapping: Tensor,
    base: Tensor,
    draft_tokens: Tensor,
    likelihoods: Tensor,
    is_typical: Tensor,
    cu_num_logits: Tensor,
) -> None:
    """Put draft tokens in place of the target's samples, so that the best typical path is accepted.

    A path is typical if all its nodes are typical. The longest typical path is taken; if there are
    several, the most probable one (arXiv 2401.10774, section 3.3.1). After its end the target's
    sample stays.

    Args:
        target_tokens: [L] int64, token sampled from the target at each row; changed in place.
        states: [R, N + 1] int64 parents, depths and ancestors by state index, as `trees.set_trees`
            writes them.
        idx_mapping: [B] state index of each request.
        base: [>= B] int32, as `trees.prepare` writes it.
        draft_tokens: [L] token of each row's node, the roots' included.
        likelihoods: [L] float32, log-probability of that token at its parent; arbitrary for roots.
        is_typical: [L] bool, whether that token is typical there; arbitrary for roots.
        cu_num_logits: [B + 1] int32, first row of each request.

    """
    num_reqs = idx_mapping.shape[0]
    if num_reqs:
        parents, depths, ancestors = states
        _typical_kernel[(num_reqs,)](
            target_tokens,
            parents,
            depths,
            ancestors,
            parents.stride(0),
            idx_mapping,
            base,
            draft_tokens,
            likelihoods,
            is_typical,
            cu_num_logits,
            BLOCK=triton.next_power_of_2(parents.shape[1]),
            num_warps=1,
        )
