"""Compaction: accepted K/V moves from the slots of its nodes to the slots of its depths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class CacheGroup:
    """Layers whose caches have the same shape, strides and element size.

    Attributes:
        caches: the layers' caches, logically [blocks, heads, tokens of a block, content].
        addresses: [L] int64, their addresses.
        slot_rows: [L] int64, each layer's row of a step's slot mappings.
        words: int32 or int8, the unit that moves.
        strides: strides of block, head and token, in words.
        content: number of words of one head and token.

    """

    caches: tuple[Tensor, ...]
    addresses: Tensor
    slot_rows: Tensor
    words: torch.dtype
    strides: tuple[int, int, int]
    content: int

    @classmethod
    def build(cls, caches: Sequence[Tensor], slot_rows: Sequence[int]) -> list[CacheGroup]:
        """Group ``caches`` by form; a cache that two layers share counts once.

        Args:
            caches: cache of each layer, with a contiguous last dimension.
            slot_rows: row of each layer; a cache that rows share is moved for each of them.

        """
        by_form: dict[object, dict[tuple[int, int], Tensor]] = {}
        for cache, row in zip(caches, slot_rows, strict=True):
            assert cache.dim() == 4
            assert cache.stride(3) == 1
            form = (cache.shape, cache.stride(), cache.element_size())
            by_form.setdefault(form, {}).setdefault((cache.data_ptr(), row), cache)
        return [cls._of_one_form(layers) for layers in by_form.values()]

    @classmethod
    def _of_one_form(cls, layers: dict[tuple[int, int], Tensor]) -> CacheGroup:
        first = next(iter(layers.values()))
        size = first.element_size()
        lengths = [length * size for length in (*first.stride()[:3], first.shape[3])]
        aligned = all(v % 4 == 0 for v in [*lengths, *(address for address, _ in layers)])
        width = 4 if aligned else 1
        block, head, token, content = (length // width for length in lengths)

        def numbers(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=first.device)

        return cls(
            caches=tuple(layers.values()),
            addresses=numbers([address for address, _ in layers]),
            slot_rows=numbers([row for _, row in layers]),
            words=torch.int32 if aligned else torch.int8,
            strides=(block, head, token),
            content=content,
        )


@triton.jit
def _compact_kernel(
    addresses_ptr,
    slot_rows_ptr,
    slots_ptr,
    slots_stride,
    logits_indices_ptr,
    cu_num_logits_ptr,
    path_ptr,
    length_ptr,
    block_size,
    stride_block,
    stride_head,
    stride_token,
    MAX_DEPTH: tl.constexpr,
    CONTENT: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_WORDS: tl.constexpr,
):
    req = tl.program_id(0)
    layer = tl.program_id(1)
    head = tl.program_id(2)
    length = tl.load(length_ptr + req)
    if length > 0:
        address = tl.load(addresses_ptr + layer)
        if IN_WORDS:
            cache = address.to(tl.pointer_type(tl.int32))
        else:
            cache = address.to(tl.pointer_type(tl.int8))
        cache += head.to(tl.int64) * stride_head
        first = tl.load(logits_indices_ptr + tl.load(cu_num_logits_ptr + req))
        slots = slots_ptr + tl.load(slot_rows_ptr + layer) * slots_stride + first
        word = tl.arange(0, BLOCK)
        is_word = word < CONTENT
        # One after the other, the shallow ones first: a node never lies before the slot of its
        # depth, so that slot may be the source of a deeper node but of no shallower one.
        for depth in range(1, length + 1):
            node = tl.load(path_ptr + req * (MAX_DEPTH + 1) + depth)
            if node != depth:
                a = tl.load(slots + node).to(tl.int64)
                b = tl.load(slots + depth).to(tl.int64)
                source = cache + a // block_size * stride_block + a % block_size * stride_token
                target = cache + b // block_size * stride_block + b % block_size * stride_token
                tl.store(target + word, tl.load(source + word, mask=is_word), mask=is_word)


def compact(
    groups: Sequence[CacheGroup],
    slot_mappings: Tensor,
    logits_indices: Tensor,
    cu_num_logits: Tensor,
    path: Tensor,
    length: Tensor,
) -> None:
    """Move the K/V of accepted nodes to the slots of a chain, byte by byte, in all layers.

    The content of the cache is moved unchanged, in any number format, with its scales.

    Args:
        groups: the layers' caches.
        slot_mappings: [KV groups, T] slot of each token of the step.
        logits_indices: [L] token of each row of the logits.
        cu_num_logits: [B + 1] int32, first row of each request.
        path: [B, D + 1] int32, accepted nodes by depth, as `accept` gives them.
        length: [B] int32, how many were accepted.

    """
    num_reqs, width = path.shape
    for group in groups if num_reqs else ():
        _compact_kernel[(num_reqs, len(group.caches), group.caches[0].shape[1])](
            group.addresses,
            group.slot_rows,
            slot_mappings,
            slot_mappings.stride(0),
            logits_indices,
            cu_num_logits,
            path,
            length,
            group.caches[0].shape[2],
            *group.strides,
            MAX_DEPTH=width - 1,
            CONTENT=group.content,
            BLOCK=triton.next_power_of_2(group.content),
            IN_WORDS=group.words == torch.int32,
        )
