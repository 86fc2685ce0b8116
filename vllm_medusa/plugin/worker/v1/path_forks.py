"""Attention and commit of trees: path forks in vLLM's paged KV cache.

The runner calls, in this order at every step: `begin_step` (before the attention metadata is
built), then vLLM builds metadata and runs the model, through the two methods that are wrapped here,
then `commit`. The index arithmetic is in `vllm_medusa.tree.forks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from vllm_medusa.plugin.fork_pool import ForkPool
from vllm_medusa.plugin.worker.v1.fork_grants import ForkGrants
from vllm_medusa.plugin.worker.v1.step import Step
from vllm_medusa.tree.fork_step import ForkStep
from vllm_medusa.tree.forks import (
    ForkGeometry,
    commit_writes,
    expand_block_table,
    mirror_copies,
    write_slots,
)
from vllm_medusa.tree.step_trees import IntArray
from vllm_medusa.tree.verify import Acceptance


@dataclass
class _GroupStep:
    """Block tables and slots of one KV-cache group in a step (`tree.forks`)."""

    rows: Tensor
    slots: Tensor
    commit_slots: Tensor


class _Layer:
    """One attention layer, whose K/V write is wrapped.

    It keeps a step's K/V until the commit writes the accepted part again.
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
        forks = self._forks.forks
        if forks is None:
            self._write(layer, key, value, kv_cache, slot_mapping)
            return
        key = key.index_select(0, forks.device.write_token)
        value = value.index_select(0, forks.device.write_token)
        self._write(layer, key, value, kv_cache, self._forks.group_step(self._group).slots)
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
        pool: place of the fork blocks.
        attn_groups: vLLM's attention groups, by KV-cache group; their ``build_metadata`` is
            wrapped.
        layers: vLLM's attention layers by name; their K/V writes are wrapped.
        device: of the KV cache.

    Attributes:
        pool: place of the fork blocks.
        forks: indices of the current step if it has forks, else None.
        grants: the fork blocks that each request holds.

    """

    def __init__(
        self,
        pool: ForkPool,
        attn_groups: Sequence[Sequence[AttentionGroup]],
        layers: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.forks: ForkStep | None = None
        self.grants = ForkGrants(pool.num_requests)
        self.pool = pool
        self._device = device
        self._step: Step
        self._groups: list[_GroupStep] = []
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

    def num_mirrored(self, req_ids: Sequence[str], num_computed: IntArray) -> IntArray:
        """Return [B]: how many fork paths of each request hold its tail, at least 1."""
        tokens = zip(req_ids, num_computed.tolist(), strict=True)
        return np.array([self.grants.num_mirrored(*pair) for pair in tokens], dtype=np.int64)

    def group_step(self, group: int) -> _GroupStep:
        """Return block tables and slots of a KV-cache group in the current step."""
        return self._groups[group]

    def begin_step(
        self, step: Step, num_computed_tokens: Tensor, block_tables: Sequence[Tensor]
    ) -> None:
        """Prepare the forks of a step.

        Args:
            step: the step.
            num_computed_tokens: [B] tokens in the KV cache, on the device.
            block_tables: [B, W] of each KV-cache group.

        """
        self.forks = forks = step.plan.forks
        if forks is None:
            return
        self._step = step
        places = [self.grants.place_of(req_id) for req_id in step.req_ids]
        place = torch.tensor(places, device=self._device)
        self._computed = num_computed_tokens.to(torch.int64)
        longest = int((step.num_computed + forks.num_tokens).max())
        self._groups = []
        for group, geometry in enumerate(self.pool.geometries):
            table = block_tables[group][:, : -(-longest // geometry.block_size)]
            base = self.pool.group_base(group) + place * geometry.blocks_per_request
            self._mirror_tails(group, geometry, table, base)
            rows = expand_block_table(forks.device, geometry, table, self._computed, base)
            slots = write_slots(forks.device, geometry.block_size, rows, self._computed)
            self._groups.append(_GroupStep(rows[: forks.num_seqs], *slots))

    def end_step(self) -> None:
        """Drop the current step, so that the next step runs without forks."""
        self.forks = None

    def commit(self, acceptance: Acceptance) -> None:
        """Write the accepted tokens' K/V to the requests' own blocks and to their forks."""
        if self.forks is None:
            return
        for step, layers in zip(self._groups, self._layers, strict=True):
            source, slots = commit_writes(
                self.forks.device, step.commit_slots, acceptance.path, acceptance.length
            )
            if self._device.type == "cpu":
                # On a CPU there is nothing to wait for: omit the writes that would be skipped.
                written = (slots >= 0).nonzero().flatten()
                source, slots = source[written], slots[written]
                if not len(written):
                    continue
            for layer in layers:
                layer.commit(source, slots)

    def note_committed(self, sampled: Sequence[Sequence[int]]) -> None:
        """Record how far the forks of each request hold its tail, once its tokens are known.

        Args:
            sampled: [B] tokens that the step emitted; none for a chunk of a prompt.

        """
        if self.forks is None:
            return
        computed = self._step.num_computed.tolist()
        for index, live in self.forks.mirrored:
            if tokens := len(sampled[index]):
                req_id = self._step.req_ids[index]
                self.grants.set_mirrored(req_id, computed[index] + tokens, live)

    def _mirror_tails(
        self, group: int, geometry: ForkGeometry, table: Tensor, base: Tensor
    ) -> None:
        """Copy the partial tail blocks of requests to those of their forks that lack them."""
        assert self.forks is not None
        reqs = self.forks.without_mirrors
        if not len(reqs):
            return
        reqs = reqs[self._step.num_computed[reqs] % geometry.block_size > 0]
        if not len(reqs):
            return
        block_idx = self._step.num_computed[reqs] // geometry.block_size
        rows = torch.from_numpy(reqs).to(self._device)
        tails = table[rows, torch.from_numpy(block_idx).to(self._device)]
        source, destination = mirror_copies(
            geometry,
            torch.from_numpy(self.forks.num_mirrored[reqs]).to(self._device),
            torch.from_numpy(self.forks.num_paths[reqs]).to(self._device),
            tails.to(torch.int64),
            torch.from_numpy(block_idx).to(self._device),
            base[rows],
        )
        for cache in self._caches[group]:
            cache.index_copy_(0, destination, cache.index_select(0, source))

    def _wrap_metadata(self, group: AttentionGroup, group_idx: int) -> None:
        build = group.build_metadata

        def build_expanded(metadata: CommonAttentionMetadata, *args: Any, **kwargs: Any) -> Any:
            if self.forks is not None:
                metadata = self._expand(metadata, group_idx)
            return build(metadata, *args, **kwargs)

        group.build_metadata = build_expanded
        for builder in group.metadata_builders:
            # A shortcut that reuses another group's metadata with this group's own block table,
            # which is not the expanded one (gpu_model_runner.py, _build_attn_group_metadata).
            builder.supports_update_block_table = False

    def _expand(self, metadata: CommonAttentionMetadata, group: int) -> CommonAttentionMetadata:
        """Return metadata in which every fork path is a sequence of its own."""
        assert self.forks is not None
        indices, host = self.forks.device, self.forks.host
        seq_lens = self._computed.index_select(0, indices.seq_req) + indices.seq_length
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
            query_start_loc=indices.query_start_loc,
            query_start_loc_cpu=host.query_start_loc,
            seq_lens=seq_lens.to(metadata.seq_lens.dtype),
            seq_lens_cpu_upper_bound=upper_bound,
            num_reqs=self.forks.num_seqs,
            max_query_len=self.forks.max_query_len,
            block_table_tensor=self._groups[group].rows,
            is_prefilling=is_prefilling,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )


def _shares_cache(layer: Any) -> bool:
    return getattr(layer, "kv_sharing_target_layer_name", None) is not None
