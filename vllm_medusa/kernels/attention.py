"""Attention over the paged cache, in which a request's queries can form a tree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vllm_medusa.kernels.attention_kernel import attention_kernel, merge_kernel

#: Keys that a program goes through at a time.
TILE = 32
#: Rows (query tokens times heads of one KV head) that a program holds at most.
MAX_ROWS = 64
MAX_SPLITS = 16


@dataclass(frozen=True)
class Scales:
    """Factors on the numbers of a quantised cache.

    Attributes:
        key: [1] float32 for the whole tensor, or [blocks, tokens, heads] float32 in any strides.
        value: likewise, in the same strides.

    """

    key: Tensor
    value: Tensor

    @property
    def kind(self) -> int:
        """The kernel's constant for it."""
        return 2 if self.key.dim() == 3 else 1

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of block, token and head."""
        return self.key.stride() if self.key.dim() == 3 else (0, 0, 0)


@dataclass(frozen=True)
class Features:
    """Features of a layer's attention beside the softmax of scaled products.

    Attributes:
        window: number of positions that a query sees, its own included; 0: all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0: no cap.
        slopes: [heads] float32 slopes of ALiBi.
        slopes_of_root: ALiBi takes the square root of the distance.
        sinks: [heads] score of a key without value.
        scales: factors of a quantised cache.

    """

    window: int = 0
    softcap: float = 0.0
    slopes: Tensor | None = None
    slopes_of_root: bool = False
    sinks: Tensor | None = None
    scales: Scales | None = None

    def constants(self) -> dict[str, int]:
        """Return the kernel's constants of a layer."""
        return {
            "WINDOW": self.window,
            "HAS_SOFTCAP": self.softcap > 0,
            "ALIBI": 0 if self.slopes is None else 1 + self.slopes_of_root,
            "HAS_SINKS": self.sinks is not None,
            "SCALES": 0 if self.scales is None else self.scales.kind,
        }

    @property
    def needs_positions(self) -> bool:
        """Whether attention to the context depends on where in the tree a query is."""
        return self.window > 0 or self.slopes is not None


@dataclass(frozen=True)
class Workspace:
    """Partial results of the splits of the context.

    Attributes:
        out: [rows, heads, head size to the next power of two] float32.
        top: [rows, heads] float32, greatest score.
        total: [rows, heads] float32, sum of the weights.

    A row is one query token and split.

    """

    out: Tensor
    top: Tensor
    total: Tensor

    @classmethod
    def make(
        cls, rows: int, num_heads: int, head_size: int, device: torch.device | str
    ) -> Workspace:
        """Allocate for ``rows`` pairs of query token and split."""
        pad = triton.next_power_of_2(head_size)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(empty(rows, num_heads, pad), empty(rows, num_heads), empty(rows, num_heads))

    def num_splits(self, num_tokens: int, num_programs: int, wanted_programs: int) -> int:
        """Return the number of parts of the context; a power of two.

        Args:
            num_tokens: number of query tokens, with the padding of a CUDA graph.
            num_programs: number of programs without a split.
            wanted_programs: number of programs that fill the device.

        """
        splits = 1
        while (
            splits < MAX_SPLITS
            and num_programs * splits < wanted_programs
            and 2 * splits * num_tokens <= self.top.shape[0]
        ):
            splits *= 2
        return splits


@dataclass(frozen=True)
class Step:
    """The queries and keys of a step, all in persistent tensors.

    Attributes:
        query_start_loc: [B + 1] int32, first query of each request.
        seq_lens: [B] int32, keys of each request, its queries' own included.
        block_table: [B, blocks] int32.
        positions: [T] int64, position of each query.
        ancestors: [T] int64, bit ``j``: sees node ``j``; only for tokens in trees.
        base: [B] int32, position of each root, or `NO_TREE`.
        max_query_len: no request has more queries.

    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    positions: Tensor
    ancestors: Tensor
    base: Tensor
    max_query_len: int


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    step: Step,
    scale: float,
    features: Features = Features(),
    workspace: Workspace | None = None,
    wanted_programs: int = 1,
    context_lse: Tensor | None = None,
) -> None:
    """Attend from every query to the keys of its request that it may see.

    A query sees the keys before its request's tree that are not after the query, and in the tree
    its ancestors and itself. Distances are differences of positions, so a node's depth counts.

    Another kernel can attend to the *context*, the keys before a request's queries. Then this one
    goes on from there: a softmax over some keys is one key more, with their log-sum-exp as its
    score (arXiv 2501.01005, section 2.2). Sinks count here, so not there.

    The host decides nothing that differs from step to step, so a CUDA graph can replay it.
    Sizes (`TILE`, `MAX_ROWS`, `MAX_SPLITS`) are not tuned yet: no GPU has run it.

    Args:
        query: [T, Hq, D].
        key_cache, value_cache: [blocks, tokens of a block, Hkv, D], any strides but the last.
        out: [T, Hq, D], written; with ``context_lse`` first read.
        step: the queries and keys.
        scale: factor on the products.
        features: features of the layer.
        workspace: memory for splits of the context; None: no splits.
        wanted_programs: number of programs that fill the device; the context is split to reach it.
        context_lse: [Hq, T] float32 log-sum-exp of the context's scores, whose attention ``out``
            holds; infinity: no keys. Not with `Features.needs_positions`. None: no other kernel.

    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, num_reqs = key_cache.shape[2], step.seq_lens.shape[0]
    group = num_heads // num_kv_heads
    block_m = _block_rows(group, step.max_query_len, head_size)
    num_blocks = num_tokens // (block_m // group) + num_reqs
    splits, parts = 1, (out, out, out)
    if workspace is not None and context_lse is None:
        splits = workspace.num_splits(num_tokens, num_blocks * num_kv_heads, wanted_programs)
        parts = (workspace.out, workspace.top, workspace.total)
    tensors, strides = _of_layer(features, context_lse, out)
    attention_kernel[(num_blocks, num_kv_heads, splits)](
        out, *parts, query, key_cache, value_cache, step.block_table, step.query_start_loc,
        step.seq_lens, step.positions, step.ancestors, step.base, *tensors, scale,
        features.softcap, num_reqs, *query.stride()[:2], *out.stride()[:2],
        step.block_table.stride(0), *key_cache.stride()[:3], *value_cache.stride()[:3], *strides,
        NUM_HEADS=num_heads, GROUP=group, HEAD_SIZE=head_size,
        PAD=triton.next_power_of_2(head_size), BLOCK_SIZE=key_cache.shape[1],
        BLOCK_Q=block_m // group, BLOCK_M=block_m, TILE=TILE, NUM_SPLITS=splits,
        HAS_CONTEXT=context_lse is not None, **features.constants(),
    )  # fmt: skip
    if splits > 1:
        _merge(out, parts, features.sinks, splits)


def _merge(out: Tensor, parts: tuple[Tensor, ...], sinks: Tensor | None, splits: int) -> None:
    """Merge the splits of the context."""
    num_tokens, num_heads, head_size = out.shape
    pad, has_sinks = triton.next_power_of_2(head_size), sinks is not None
    sinks = out if sinks is None else sinks
    merge_kernel[(num_tokens, num_heads)](
        out, *parts, sinks, *out.stride()[:2], num_heads, head_size, pad, splits, has_sinks
    )  # fmt: skip


def _of_layer(
    features: Features, context_lse: Tensor | None, other: Tensor
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Return slopes, sinks, scales, log-sum-exps; and the strides of scales and log-sum-exps.

    In place of what a layer does not have is any other tensor; the kernel does not read it.
    """
    scales, lse = features.scales, context_lse
    assert lse is None or not features.needs_positions
    given = (
        features.slopes,
        features.sinks,
        None if scales is None else scales.key,
        None if scales is None else scales.value,
        lse,
    )
    strides = (0, 0, 0) if scales is None else scales.strides
    strides += (0, 0) if lse is None else lse.stride()
    return tuple(other if tensor is None else tensor for tensor in given), strides


def _block_rows(group: int, max_query_len: int, head_size: int) -> int:
    """Rows of a program: all queries of a small tree, so that its context is read once."""
    most = MAX_ROWS if head_size <= 128 else MAX_ROWS // 2
    wanted = triton.next_power_of_2(group * max_query_len)
    return max(16, triton.next_power_of_2(group), min(most, wanted))
