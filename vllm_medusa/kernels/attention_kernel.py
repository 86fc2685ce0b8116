"""The kernels of `attention`: a running softmax over tiles of keys, and the merging of splits.

The split over the context and the numbering of query blocks are those of vLLM's
``triton_unified_attention.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _request_of_block(query_start_ptr, block, num_reqs, BLOCK_Q: tl.constexpr):
    """Blocks of queries are numbered ``query_start // BLOCK_Q + request``, as in vLLM's kernel."""
    left: tl.int32 = 0
    right = num_reqs
    while left < right:
        mid = (left + right) // 2
        if tl.load(query_start_ptr + mid) // BLOCK_Q + mid <= block:
            left = mid + 1
        else:
            right = mid
    return left - 1


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def _may_see(keys, key_position, slot, position, ancestors, base, is_key, WINDOW: tl.constexpr):
    """[rows, keys] causal by slot in front of the tree, by ancestors within, window by position."""
    node = keys - base
    # A tile can have keys after the tree, for which the shift would be too large.
    shift = tl.minimum(tl.maximum(node, 0), 63).to(tl.int64)
    bit = (ancestors[:, None] >> shift[None, :]) & 1
    seen = is_key[None, :] & (keys[None, :] <= slot[:, None])
    seen = seen & ((bit == 1) | (node < 0)[None, :])
    if WINDOW > 0:
        seen = seen & (position[:, None] - key_position[None, :] < WINDOW)
    return seen


@triton.jit
def _bend(
    scores, key_position, position, context, slope, softcap,
    HAS_SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    if HAS_SOFTCAP:
        scores = softcap * _tanh(scores / softcap)
    if ALIBI == 1:
        scores += slope[:, None] * (key_position - context).to(tl.float32)[None, :]
    if ALIBI == 2:
        distance = tl.maximum(position[:, None] - key_position[None, :], 0)
        scores -= slope[:, None] * tl.sqrt(distance.to(tl.float32))
    return scores


@triton.jit
def _scales_of(scale_ptr, at, is_key, SCALES: tl.constexpr):
    """A factor for each key; ``at`` is its place among the scales by token and head."""
    if SCALES == 2:
        factor = tl.load(scale_ptr + at, mask=is_key, other=0.0)
    else:
        factor = tl.where(is_key, tl.load(scale_ptr), 0.0)
    return factor


@triton.jit
def _attend_tile(
    top, total, acc, query, keys, last, slot, position, ancestors, base, context, slope, scale,
    softcap, key_ptr, value_ptr, table_ptr, positions_ptr, key_scale_ptr, value_scale_ptr,
    key_stride_b, key_stride_t, value_stride_b, value_stride_t, scale_stride_b, scale_stride_t,
    HEAD_SIZE: tl.constexpr, PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the running softmax."""
    dim = tl.arange(0, PAD)
    is_dim = dim < HEAD_SIZE
    is_key = keys < last
    page = tl.load(table_ptr + keys // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
    inside = (keys % BLOCK_SIZE).to(tl.int64)
    key = tl.load(
        key_ptr + (page * key_stride_b + inside * key_stride_t)[None, :] + dim[:, None],
        mask=is_dim[:, None] & is_key[None, :], other=0.0,
    )  # fmt: skip
    value = tl.load(
        value_ptr + (page * value_stride_b + inside * value_stride_t)[:, None] + dim[None, :],
        mask=is_key[:, None] & is_dim[None, :], other=0.0,
    )  # fmt: skip
    key_position = keys
    if (WINDOW > 0) or (ALIBI > 0):
        in_tree = is_key & (keys >= base)
        of_node = tl.load(positions_ptr + keys - base, mask=in_tree, other=0)
        key_position = tl.where(in_tree, of_node.to(tl.int32), keys)
    at = page * scale_stride_b + inside * scale_stride_t
    scores = tl.dot(query, key.to(query.dtype), input_precision="ieee") * scale
    if SCALES > 0:
        scores *= _scales_of(key_scale_ptr, at, is_key, SCALES)[None, :]
    scores = _bend(scores, key_position, position, context, slope, softcap, HAS_SOFTCAP, ALIBI)
    seen = _may_see(keys, key_position, slot, position, ancestors, base, is_key, WINDOW)
    scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    shift = tl.where(new_top > float("-inf"), new_top, 0.0)
    weight = tl.exp(scores - shift[:, None])
    keep = tl.exp(top - shift)
    total = total * keep + tl.sum(weight, axis=1)
    if SCALES > 0:
        weight *= _scales_of(value_scale_ptr, at, is_key, SCALES)[None, :]
    weight, value = weight.to(query.dtype), value.to(query.dtype)
    acc = acc * keep[:, None] + tl.dot(weight, value, input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _slopes_of(slope_ptr, is_row, ALIBI: tl.constexpr):
    """A slope for each row; zeros without ALiBi."""
    slope = is_row.to(tl.float32) * 0
    if ALIBI > 0:
        slope = tl.load(slope_ptr, mask=is_row, other=0.0).to(tl.float32)
    return slope


@triton.jit
def _begin_softmax(
    out_ptr, lse_ptr, is_row, mask,
    BLOCK_M: tl.constexpr, PAD: tl.constexpr, HAS_CONTEXT: tl.constexpr,
):  # fmt: skip
    """Return an empty softmax, or go on from what another kernel made of the context."""
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PAD], dtype=tl.float32)
    if HAS_CONTEXT:
        lse = tl.load(lse_ptr, mask=is_row, other=float("-inf"))
        # Where there are no keys FlashAttention 2 writes infinity, and 3 minus infinity.
        top = tl.where(lse < float("inf"), lse, float("-inf"))
        total = tl.where(top > float("-inf"), 1.0, 0.0)
        before = tl.load(out_ptr, mask=mask, other=0.0).to(tl.float32)
        acc = tl.where((total > 0)[:, None], before, 0.0)
    return top, total, acc


@triton.jit
def _tiles_of_split(
    split, context, first, num_keys, base,
    TILE: tl.constexpr, WINDOW: tl.constexpr, NUM_SPLITS: tl.constexpr,
):  # fmt: skip
    """This split's share of the tiles that any row of the block may see."""
    num_tiles = tl.cdiv(num_keys, TILE)
    first_tile = 0
    if WINDOW > 0:
        # A node's position can be before its slot, at the earliest at the root.
        lowest = tl.minimum(context + first, base)
        first_tile = tl.maximum(lowest - WINDOW + 1, 0) // TILE
    per_split = tl.cdiv(num_tiles - first_tile, NUM_SPLITS)
    begin = first_tile + split * per_split
    return begin, tl.minimum(begin + per_split, num_tiles)


@triton.jit
def _write_out(
    out_ptr, top, total, acc, sink, HAS_SINKS: tl.constexpr, mask
):  # fmt: skip
    """Divide by the sum of the weights, to which a sink adds its own."""
    if HAS_SINKS:
        sink = sink.to(tl.float32)
        new_top = tl.maximum(top, sink)
        keep = tl.exp(top - new_top)
        total = total * keep + tl.exp(sink - new_top)
        acc = acc * keep[:, None]
    tl.store(out_ptr, acc / tl.where(total > 0, total, 1.0)[:, None], mask=mask)


@triton.jit
def attention_kernel(
    out_ptr, part_ptr, part_top_ptr, part_total_ptr, query_ptr, key_ptr, value_ptr,
    block_table_ptr, query_start_ptr, seq_lens_ptr, positions_ptr, ancestors_ptr, base_ptr,
    slopes_ptr, sinks_ptr, key_scale_ptr, value_scale_ptr, lse_ptr, scale, softcap, num_reqs,
    query_stride_t, query_stride_h, out_stride_t, out_stride_h, table_stride,
    key_stride_b, key_stride_t, key_stride_h, value_stride_b, value_stride_t, value_stride_h,
    scale_stride_b, scale_stride_t, scale_stride_h, lse_stride_h, lse_stride_t,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    NUM_SPLITS: tl.constexpr, WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, HAS_SINKS: tl.constexpr, SCALES: tl.constexpr, HAS_CONTEXT: tl.constexpr,
):  # fmt: skip
    """One block of a request's queries, the heads of one KV head, one split of the keys."""
    block, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    req = _request_of_block(query_start_ptr, block, num_reqs, BLOCK_Q)
    q_start = tl.load(query_start_ptr + req)
    q_len = tl.load(query_start_ptr + req + 1) - q_start
    first = (block - q_start // BLOCK_Q - req) * BLOCK_Q
    if first >= q_len:
        return
    seq_len, base = tl.load(seq_lens_ptr + req), tl.load(base_ptr + req)
    context = seq_len - q_len
    row = tl.arange(0, BLOCK_M)
    local = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (local < q_len) & (row // GROUP < BLOCK_Q)
    token = (q_start + local).to(tl.int64)
    dim = tl.arange(0, PAD)
    mask = is_row[:, None] & (dim < HEAD_SIZE)[None, :]
    row_ptr = query_ptr + token * query_stride_t + head * query_stride_h
    query = tl.load(row_ptr[:, None] + dim[None, :], mask=mask, other=0.0)
    ancestors = tl.load(ancestors_ptr + token, mask=is_row, other=0)
    position = tl.load(positions_ptr + token, mask=is_row, other=0).to(tl.int32)
    slope = _slopes_of(slopes_ptr + head, is_row, ALIBI)
    out_ptrs = (out_ptr + token * out_stride_t + head * out_stride_h)[:, None] + dim[None, :]
    lse_ptrs = lse_ptr + head * lse_stride_h + token * lse_stride_t
    top, total, acc = _begin_softmax(out_ptrs, lse_ptrs, is_row, mask, BLOCK_M, PAD, HAS_CONTEXT)
    # A graph is captured with fewer keys than queries.
    left = tl.maximum(context, 0) if HAS_CONTEXT else 0
    last = tl.minimum(context + first + BLOCK_Q, seq_len)
    begin, end = _tiles_of_split(split, context, first, last - left, base, TILE, WINDOW, NUM_SPLITS)
    for tile in range(begin, end):
        top, total, acc = _attend_tile(
            top, total, acc, query, left + tile * TILE + tl.arange(0, TILE), last,
            context + local, position, ancestors, base, context, slope, scale, softcap,
            key_ptr + kv_head * key_stride_h, value_ptr + kv_head * value_stride_h,
            block_table_ptr + req.to(tl.int64) * table_stride, positions_ptr + q_start,
            key_scale_ptr + kv_head * scale_stride_h, value_scale_ptr + kv_head * scale_stride_h,
            key_stride_b, key_stride_t, value_stride_b, value_stride_t, scale_stride_b,
            scale_stride_t, HEAD_SIZE, PAD, BLOCK_SIZE, WINDOW, HAS_SOFTCAP, ALIBI, SCALES,
        )  # fmt: skip
    if NUM_SPLITS == 1:
        sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0) if HAS_SINKS else 0.0
        _write_out(out_ptrs, top, total, acc, sink, HAS_SINKS, mask)
    else:
        part = (token * NUM_SPLITS + split) * NUM_HEADS + head
        tl.store(part_ptr + part[:, None] * PAD + dim[None, :], acc, mask=mask)
        tl.store(part_top_ptr + part, top, mask=is_row)
        tl.store(part_total_ptr + part, total, mask=is_row)


@triton.jit
def merge_kernel(
    out_ptr, part_ptr, part_top_ptr, part_total_ptr, sinks_ptr, out_stride_t, out_stride_h,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, PAD: tl.constexpr,
    NUM_SPLITS: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one token and head."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, PAD)
    part = (token * NUM_SPLITS + tl.arange(0, NUM_SPLITS)) * NUM_HEADS + head
    tops = tl.load(part_top_ptr + part)
    top = tl.max(tops, axis=0)
    weight = tl.exp(tops - tl.where(top > float("-inf"), top, 0.0))
    total = tl.sum(tl.load(part_total_ptr + part) * weight, axis=0)
    mask = dim < HEAD_SIZE
    parts = tl.load(part_ptr + part[:, None] * PAD + dim[None, :], mask=mask[None, :], other=0.0)
    acc = tl.sum(parts * weight[:, None], axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        new_top = tl.maximum(top, sink)
        keep = tl.exp(top - new_top)
        total = total * keep + tl.exp(sink - new_top)
        acc *= keep
    row_ptr = out_ptr + token * out_stride_t + head * out_stride_h
    tl.store(row_ptr + dim, acc / tl.where(total > 0, total, 1.0), mask=mask)
