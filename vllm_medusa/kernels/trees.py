"""The trees of the requests, and the positions and masks of a step's tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vllm_medusa.kernels import NO_TREE

_NO_TREE = tl.constexpr(NO_TREE)


@triton.jit
def _set_trees_kernel(
    state_parents_ptr,
    state_depths_ptr,
    state_ancestors_ptr,
    state_stride,
    parents_ptr,
    parents_stride,
    idx_mapping_ptr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    req = tl.program_id(0)
    node = tl.arange(0, BLOCK)
    is_node = node < WIDTH
    row = parents_ptr + req * parents_stride
    at = tl.where(is_node, node, 0)
    depth = tl.zeros([BLOCK], dtype=tl.int64)
    seen = tl.zeros([BLOCK], dtype=tl.int64)
    one = tl.full([BLOCK], 1, dtype=tl.int64)
    # All nodes go up at the same time; a node that has reached the root stays there.
    for _ in range(WIDTH):
        seen |= one << at.to(tl.int64)
        depth += (at > 0).to(tl.int64)
        at = tl.maximum(tl.load(row + at, mask=at > 0, other=0).to(tl.int32), 0)
    state = tl.load(idx_mapping_ptr + req).to(tl.int64) * state_stride
    parent = tl.load(row + node, mask=is_node & (node > 0), other=0).to(tl.int64)
    tl.store(state_parents_ptr + state + node, parent, mask=is_node)
    tl.store(state_depths_ptr + state + node, depth, mask=is_node)
    tl.store(state_ancestors_ptr + state + node, seen, mask=is_node)


def set_trees(
    state_parents: Tensor,
    state_depths: Tensor,
    state_ancestors: Tensor,
    parents: Tensor,
    idx_mapping: Tensor,
) -> None:
    """Give each request of a batch the tree that it will run next.

    Args:
        state_parents: [R, N + 1] int64, parent of each node by state index; the root's is 0, that
            of a node that is never accepted -1.
        state_depths: [R, N + 1] int64, depth of each node.
        state_ancestors: [R, N + 1] int64, bit ``j``: node ``j`` is on the way from the root to the
            node, or the node itself.
        parents: [B, N + 1] integers, each smaller than the node's own index; the root's entry is
            ignored. A node with parent -1 runs below the root and is never accepted.
        idx_mapping: [B] state index of each request.

    """
    num_reqs, width = parents.shape
    if num_reqs:
        _set_trees_kernel[(num_reqs,)](
            state_parents,
            state_depths,
            state_ancestors,
            state_parents.stride(0),
            parents,
            parents.stride(0),
            idx_mapping,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            num_warps=1,
        )


@triton.jit
def draft_nodes(
    req, cu_num_logits_ptr, base_ptr, idx_mapping_ptr, state_stride, BLOCK: tl.constexpr
):
    """First row of a request, its state's offset, the nodes, and which of them it verifies."""
    start = tl.load(cu_num_logits_ptr + req)
    num_nodes = tl.load(cu_num_logits_ptr + req + 1) - start
    has_tree = tl.load(base_ptr + req) != _NO_TREE
    node = tl.arange(0, BLOCK)
    state = tl.load(idx_mapping_ptr + req).to(tl.int64) * state_stride
    return start, state, node, (node > 0) & (node < num_nodes) & has_tree


@triton.jit
def _prepare_kernel(
    positions_ptr,
    ancestors_ptr,
    base_ptr,
    context_lens_ptr,
    state_depths_ptr,
    state_ancestors_ptr,
    state_stride,
    idx_mapping_ptr,
    query_start_ptr,
    seq_lens_ptr,
    cu_num_logits_ptr,
    prefill_len_ptr,
    num_reqs,
    BLOCK: tl.constexpr,
):
    req = tl.program_id(0)
    if req >= num_reqs:  # the padding of a CUDA graph
        tl.store(base_ptr + req, _NO_TREE)
        tl.store(context_lens_ptr + req, 0)
        return
    state = tl.load(idx_mapping_ptr + req).to(tl.int64)
    first_token = tl.load(query_start_ptr + req)
    seq_len = tl.load(seq_lens_ptr + req)
    tl.store(context_lens_ptr + req, seq_len + first_token - tl.load(query_start_ptr + req + 1))
    num_nodes = tl.load(cu_num_logits_ptr + req + 1) - tl.load(cu_num_logits_ptr + req)
    base = seq_len - num_nodes
    # The scheduler pads a new request with placeholder drafts (`scheduler.py`): its query begins in
    # the prompt, where no tree begins.
    has_tree = (num_nodes > 1) & (base >= tl.load(prefill_len_ptr + state))
    tl.store(base_ptr + req, tl.where(has_tree, base, _NO_TREE))
    if has_tree:
        node = tl.arange(0, BLOCK)
        is_node = node < num_nodes
        token = first_token + node
        row = state * state_stride + node
        depth = tl.load(state_depths_ptr + row, mask=is_node, other=0)
        seen = tl.load(state_ancestors_ptr + row, mask=is_node, other=0)
        tl.store(positions_ptr + token, base + depth, mask=is_node)
        tl.store(ancestors_ptr + token, seen, mask=is_node)


def prepare(
    positions: Tensor,
    ancestors: Tensor,
    base: Tensor,
    context_lens: Tensor,
    state_depths: Tensor,
    state_ancestors: Tensor,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    cu_num_logits: Tensor,
    prefill_len: Tensor,
) -> None:
    """Write a step's positions, ancestor masks, bases, and lengths of context.

    Args:
        positions: [T] int64, position of each token; those of trees become ``base + depth``.
        ancestors: [T] int64, written for the tokens of trees.
        base: [max requests] int32, written as a whole.
        context_lens: [max requests] int32, written as a whole: keys before a request's queries.
        state_depths: [R, N + 1] int64, as `set_trees` writes them.
        state_ancestors: [R, N + 1] int64, likewise.
        idx_mapping: [B] state index of each request.
        query_start_loc: [>= B + 1] int32, first token of each request.
        seq_lens: [>= B] int32, keys of each request, this step's tokens included.
        cu_num_logits: [B + 1] int32, first row of each request among the logits.
        prefill_len: [R] int32, prompt tokens (and, after a preemption, output) of each state.

    """
    _prepare_kernel[(base.shape[0],)](
        positions,
        ancestors,
        base,
        context_lens,
        state_depths,
        state_ancestors,
        state_depths.stride(0),
        idx_mapping,
        query_start_loc,
        seq_lens,
        cu_num_logits,
        prefill_len,
        idx_mapping.shape[0],
        BLOCK=triton.next_power_of_2(state_depths.shape[1]),
        num_warps=1,
    )
