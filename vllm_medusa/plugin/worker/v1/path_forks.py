"""How a tree is attended to and committed: path forks over vLLM's paged KV cache.

The runner calls, in this order at every step: `begin_step` (before the attention metadata is
built), then vLLM builds metadata and runs the model, through the two seams wrapped here, then
`commit`. The index arithmetic is in `vllm_medusa.tree.forks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_medusa.plugin.fork_pool import ForkPool
from vllm_medusa.plugin.worker.v1.fork_slots import ForkSlots
from vllm_medusa.tree.forks import (
    ForkGeometry,
    StepShape,
    StepShapes,
    commit_writes,
    expand_block_table,
    mirror_copies,
    write_slots,
)
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.verify import Acceptance


@dataclass
class _GroupStep:
    """What one KV-cache group needs in a step: block tables and slots (`tree.forks`)."""

    rows: Tensor
    slots: Tensor
    commit_slots: Tensor


class _Layer:
    """One attention layer, its K/V write seam wrapped.

    A step's K/V is kept until the commit writes the accepted part of it again.
    """

    def __init__(self, forks: PathForks, layer: Any, group: int) -> None:
        self._forks = forks
        self._group = group
        self.layer = layer
        # vLLM calls the method on the instance (attention.py, unified_kv_cache_update).
        self._write = layer.impl.do_kv_cache_update
        layer.impl.do_kv_cache_update = self._write_forked
        self._kept: tuple[Tensor, Tensor] | None = None

    def _write_forked(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        shape = self._forks.shape
        if shape is None:
            self._write(layer, key, value, kv_cache, slot_mapping)
            return
        key = key.index_select(0, shape.write_token)
        value = value.index_select(0, shape.write_token)
        self._write(layer, key, value, kv_cache, self._forks.step_of(self._group).slots)
        self._kept = (key, value)

    def commit(self, source: Tensor, slots: Tensor) -> None:
        if self._kept is None:
            return
        key, value = self._kept
        self._kept = None
        self._write(
            self.layer,
            key.index_select(0, source),
            value.index_select(0, source),
            self.layer.kv_cache,
            slots,
        )


class PathForks:
    """Verifies trees with the platform's own attention kernel.

    Args:
        layout: the draft tree.
        pool: where the fork blocks are.
        attn_groups: vLLM's attention groups, by KV-cache group; their ``build_metadata`` is
            wrapped.
        layers: vLLM's attention layers by name; their K/V writes are wrapped.
        device: of the KV cache.

    Attributes:
        shape: shape of the current step if it has forks, else None.
        slots: which request holds which fork blocks.

    """

    def __init__(
        self,
        layout: TreeLayout,
        pool: ForkPool,
        attn_groups: Sequence[Sequence[AttentionGroup]],
        layers: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.shape: StepShape | None = None
        self.slots = ForkSlots(pool.num_requests)
        self._layout = layout
        self._pool = pool
        self._device = device
        self._shapes = StepShapes(layout, device)
        self._cpu_shapes = self._shapes if device.type == "cpu" else StepShapes(layout)
        self._num_paths: dict[int, int] = {}
        self._steps: list[_GroupStep] = []
        self._layers: list[list[_Layer]] = []
        self._caches: list[list[Tensor]] = []
        for group_idx, groups in enumerate(attn_groups):
            names = [name for group in groups for name in group.layer_names]
            # Layers that share another layer's cache write nothing of their own.
            own = [layers[name] for name in names if not _shares_cache(layers[name])]
            self._layers.append([_Layer(self, layer, group_idx) for layer in own])
            caches = {layer.kv_cache.data_ptr(): layer.kv_cache for layer in own}
            self._caches.append(list(caches.values()))
            for group in groups:
                self._wrap_metadata(group, group_idx)

    def num_paths(self, req: int) -> int:
        """Return how many paths the batch's request ``req`` ran if it was forked, else 0."""
        return self._num_paths.get(req, 0) if self.shape is not None else 0

    def step_of(self, group: int) -> _GroupStep:
        """Return what a KV-cache group needs in the current step."""
        return self._steps[group]

    def begin_step(
        self,
        req_ids: Sequence[str],
        num_tokens: tuple[int, ...],
        num_draft_tokens: tuple[int, ...],
        num_computed_tokens: Tensor,
        num_computed_tokens_cpu: Sequence[int],
        block_tables: Sequence[Tensor],
    ) -> StepShape | None:
        """Prepare a step; return its shape if any request is forked.

        Args:
            req_ids: the batch's requests.
            num_tokens: tokens each of them runs.
            num_draft_tokens: how many of these are drafts.
            num_computed_tokens: [B] tokens in the KV cache.
            num_computed_tokens_cpu: the same, on the host.
            block_tables: [B, W] of each KV-cache group.

        """
        self.shape = None
        if max(num_draft_tokens) <= self._layout.first_path_length:
            return None
        shape = self._shapes.get(num_tokens, num_draft_tokens)
        self._host_shape = self._cpu_shapes.get(num_tokens, num_draft_tokens)
        forked = self._host_shape.forked_reqs.tolist()
        self._num_paths = dict(zip(forked, self._host_shape.num_paths.tolist(), strict=True))
        computed = num_computed_tokens.to(torch.int64)
        fork_slots = [0] * len(req_ids)
        for req in forked:
            fork_slots[req] = self.slots.get(req_ids[req])
        slot = torch.tensor(fork_slots, device=self._device)
        stale = [
            req
            for req in forked
            if not self.slots.is_mirrored(
                req_ids[req], num_computed_tokens_cpu[req], self._num_paths[req]
            )
        ]
        longest = max(map(sum, zip(num_computed_tokens_cpu, num_tokens, strict=True)))
        self._steps = []
        for group, geometry in enumerate(self._pool.geometries):
            width = -(-longest // geometry.block_size)
            table = block_tables[group][:, :width]
            base = self._pool.group_base(group) + slot * geometry.blocks_per_request
            if stale:
                self._mirror_tails(group, geometry, table, base, stale, num_computed_tokens_cpu)
            rows = expand_block_table(shape, geometry, table, computed, base)
            slots, commit_slots = write_slots(shape, geometry, rows, computed)
            self._steps.append(_GroupStep(rows, slots, commit_slots))
        self._computed = computed
        self.shape = shape
        return shape

    def end_step(self) -> None:
        """Forget the current step, so that vLLM's next one runs as its own."""
        self.shape = None

    def commit(self, acceptance: Acceptance) -> None:
        """Write the accepted tokens' K/V to the requests' own blocks and to their forks."""
        shape = self.shape
        if shape is None:
            return
        for step, layers in zip(self._steps, self._layers, strict=True):
            source, slots = commit_writes(
                shape, step.commit_slots, acceptance.path, acceptance.length
            )
            if self._device.type == "cpu":
                # Nothing to wait for on the host: leave out what would be skipped.
                written = (slots >= 0).nonzero().flatten()
                source, slots = source[written], slots[written]
                if not len(written):
                    continue
            for layer in layers:
                layer.commit(source, slots)

    def _mirror_tails(
        self,
        group: int,
        geometry: ForkGeometry,
        table: Tensor,
        base: Tensor,
        reqs: Sequence[int],
        num_computed_tokens: Sequence[int],
    ) -> None:
        """Copy the partial tail blocks of requests whose forks do not hold them yet."""
        size = geometry.block_size
        reqs = [req for req in reqs if num_computed_tokens[req] % size]
        if not reqs:
            return
        rows = torch.tensor(reqs, device=self._device)
        tail = torch.tensor([num_computed_tokens[r] // size for r in reqs], device=self._device)
        num_paths = max(self._num_paths[req] for req in reqs)
        source, destination = mirror_copies(
            num_paths, geometry, table[rows, tail], tail, base[rows]
        )
        for cache in self._caches[group]:
            cache.index_copy_(0, destination, cache.index_select(0, source))

    def _wrap_metadata(self, group: AttentionGroup, group_idx: int) -> None:
        build = group.build_metadata

        def build_expanded(metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any) -> Any:
            if self.shape is not None:
                metadata = self._expand(metadata, group_idx)
            return build(metadata, *args, **kwargs)

        group.build_metadata = build_expanded
        for builder in group.metadata_builders:
            # A shortcut that reuses another group's metadata with this group's own block table,
            # which is not the expanded one (gpu_model_runner.py, _build_attn_group_metadata).
            builder.supports_update_block_table = False

    def _expand(self, metadata: CommonAttentionMetadata, group: int) -> CommonAttentionMetadata:
        """Return metadata in which every fork path is a sequence of its own."""
        shape, host = self.shape, self._host_shape
        assert shape is not None
        seq_lens = self._computed.index_select(0, shape.seq_req) + shape.seq_length
        upper_bound = metadata.seq_lens_cpu_upper_bound
        if upper_bound is not None:
            upper_bound = (
                seq_lens if self._device.type == "cpu" else upper_bound[host.seq_req]
            ).to(upper_bound.dtype)
        is_prefilling = metadata.is_prefilling
        if is_prefilling is not None:
            is_prefilling = is_prefilling[host.seq_req]
        return replace(
            metadata,
            query_start_loc=shape.query_start_loc,
            query_start_loc_cpu=host.query_start_loc,
            seq_lens=seq_lens.to(metadata.seq_lens.dtype),
            seq_lens_cpu_upper_bound=upper_bound,
            num_reqs=shape.num_seqs,
            max_query_len=shape.max_query_len,
            block_table_tensor=self._steps[group].rows,
            is_prefilling=is_prefilling,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )


def _shares_cache(layer: Any) -> bool:
    return getattr(layer, "kv_sharing_target_layer_name", None) is not None
