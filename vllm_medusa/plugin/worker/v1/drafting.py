"""The drafters of the next step's trees, and their input."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vllm_medusa.plugin.worker.prefix import PrefixPlaces
from vllm_medusa.plugin.worker.proposer import MedusaProposer
from vllm_medusa.tree.layout import TreeLayout
from vllm_medusa.tree.schedule import nodes_for_batch


class Draft(NamedTuple):
    """One request's draft tree.

    Attributes:
        tokens: of each draft node.
        parents: parent of each draft node; 0 is the root, the first draft node is 1.

    """

    tokens: list[int]
    parents: tuple[int, ...]


@dataclass(frozen=True)
class DraftingBatch:
    """The requests that a step has sampled tokens of.

    Attributes:
        req_ids: the requests, B.
        sampled: tokens that each request got in the step; none for a chunk of a prompt.
        texts: prompt and output of each request so far.
        num_prompt_tokens: number of prompt tokens in each text.
        hidden_states: [B, H] the target's final hidden state at each one's last accepted token.
        ends: where the requests' texts end, on the host, for heads with prefix attention.
        max_paths: most fork paths of each request's next tree.
        max_nodes: most draft nodes of it; 0: the request drafts nothing.

    """

    req_ids: Sequence[str]
    sampled: Sequence[Sequence[int]]
    texts: Sequence[NDArray[np.int32]]
    num_prompt_tokens: Sequence[int]
    hidden_states: Tensor
    ends: PrefixPlaces | None
    max_paths: Sequence[int]
    max_nodes: Sequence[int]

    @property
    def roots(self) -> NDArray[np.int64]:
        """[B] last sampled token of each request; arbitrary if there is none."""
        return np.array([tokens[-1] if tokens else 0 for tokens in self.sampled], dtype=np.int64)

    def inputs_of_heads(
        self, rows: slice | Sequence[int] = slice(None)
    ) -> tuple[Tensor, NDArray[np.int64], PrefixPlaces | None]:
        """Return what `MedusaProposer.propose` takes.

        Args:
            rows: the requests; all if not given.

        """
        ends = self.ends
        if ends is not None:
            device = self.hidden_states.device
            ends = PrefixPlaces(*(part[rows].to(device) for part in ends))
        return self.hidden_states[rows], self.roots[rows], ends


class Drafter(Protocol):
    """Drafts trees."""

    def num_paths(self, batch_size: int) -> int:
        """Return the most fork paths of its trees at a batch size."""

    def finish(self, req_ids: Iterable[str]) -> None:
        """Drop the data of requests that have ended."""

    def draft(self, batch: DraftingBatch) -> list[Draft]:
        """Return a tree for each request; it has no nodes if the request drafts nothing."""


NO_DRAFT = Draft([], ())


class StaticDrafter:
    """Drafts the same tree for every request, or a part of it by batch size.

    Args:
        proposer: has the heads and the tree.
        layout: layout of the tree.

    """

    def __init__(self, proposer: MedusaProposer, layout: TreeLayout) -> None:
        self._proposer = proposer
        self._layout = layout

    def num_paths(self, batch_size: int) -> int:
        """Return the fork paths of a batch size's tree."""
        return bisect_right(self._layout.path_starts, self._num_nodes(batch_size))

    def finish(self, req_ids: Iterable[str]) -> None:
        """Do nothing: this drafter keeps no data of requests."""

    def draft(self, batch: DraftingBatch) -> list[Draft]:
        """Return the tree, or its first path for requests that can have only one."""
        num_nodes = self._num_nodes(len(batch.req_ids))
        if not num_nodes or not any(batch.max_nodes):
            return [NO_DRAFT] * len(batch.req_ids)
        ends = (*self._layout.path_starts[1:], num_nodes + 1)
        rows = self._proposer.propose(*batch.inputs_of_heads())[:, :num_nodes].tolist()
        drafts = []
        for tokens, paths, nodes in zip(rows, batch.max_paths, batch.max_nodes, strict=True):
            size = min(num_nodes, nodes, ends[min(paths, len(ends)) - 1] - 1)
            drafts.append(Draft(tokens[:size], self._layout.parents[:size]))
        return drafts

    def _num_nodes(self, batch_size: int) -> int:
        """Look up a batch size: vLLM 0.33 does so for its V2 runner only."""
        sizes = self._proposer.config.sizes_by_batch
        return nodes_for_batch(sizes, batch_size) if sizes else len(self._layout.parents)
