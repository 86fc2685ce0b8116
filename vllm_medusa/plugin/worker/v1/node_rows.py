"""Which logits row belongs to which request and tree node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vllm_medusa.tree.layout import TreeLayout


@dataclass(frozen=True)
class NodeRows:
    """Rows of a step's logits: for each of B requests its root, then its drafts; R in all.

    Attributes:
        req: [R] request of each row.
        node: [R] tree node of each row.
        depth: [R] depth of that node.
        row: [B, N + 1] row of each node; the request's root row for nodes it does not run.
        draft: [B, N] place of each draft node among the step's draft tokens; arbitrary (but in
            range, if there are any) for nodes that are not run.
        num_draft_tokens: [B] drafts of each request.
        starts: first row of each request, and R behind the last.

    """

    req: Tensor
    node: Tensor
    depth: Tensor
    row: Tensor
    draft: Tensor
    num_draft_tokens: Tensor
    starts: tuple[int, ...]

    @property
    def num_requests(self) -> int:
        """Number of requests."""
        return len(self.starts) - 1


class NodeRowsCache:
    """Makes the `NodeRows` of a step; those of recent steps are kept."""

    def __init__(self, layout: TreeLayout, device: torch.device | str) -> None:
        self._layout = layout
        self._device = device
        self.get = lru_cache(maxsize=256)(self._make)

    def _make(self, num_draft_tokens: tuple[int, ...]) -> NodeRows:
        """Return the rows of a step; called as ``get``."""
        starts, draft_starts = [0], [0]
        for count in num_draft_tokens:
            starts.append(starts[-1] + count + 1)
            draft_starts.append(draft_starts[-1] + count)
        counts = self._indices(num_draft_tokens)
        req = self._indices(_repeat(range(len(counts)), [n + 1 for n in num_draft_tokens]))
        node = self._indices([node for n in num_draft_tokens for node in range(n + 1)])
        nodes = torch.arange(self._layout.num_nodes, device=self._device)
        row = self._indices(starts[:-1])[:, None] + nodes.where(nodes <= counts[:, None], 0)
        draft = self._indices(draft_starts[:-1])[:, None] + nodes[:-1]
        return NodeRows(
            req=req,
            node=node,
            depth=self._layout.depths[node],
            row=row,
            draft=draft.clamp(max=max(draft_starts[-1] - 1, 0)),
            num_draft_tokens=counts,
            starts=tuple(starts),
        )

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def _repeat(values: Sequence[int], counts: Sequence[int]) -> list[int]:
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
