"""Which logits row belongs to which request and tree node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_medusa.tree.step_trees import StepTrees


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
        num_drafts: [B] draft nodes of each request.
        is_run: [B, N] whether a request runs each draft node.
        earlier_siblings: [B, N, N] for each draft node the nodes before it with its parent.
        parents: [B, N + 1] as in `StepTrees`.
        depths: [B, N + 1] as in `StepTrees`.
        ancestors: [B, N + 1, D + 1] as in `StepTrees`.
        starts: first row of each request, then R.

    """

    req: Tensor
    node: Tensor
    depth: Tensor
    row: Tensor
    draft: Tensor
    num_drafts: Tensor
    is_run: Tensor
    earlier_siblings: Tensor
    parents: Tensor
    depths: Tensor
    ancestors: Tensor
    starts: tuple[int, ...]

    @classmethod
    def build(cls, trees: StepTrees, device: torch.device | str = "cpu") -> NodeRows:
        """Compute the rows of a step's trees; the tensors are on ``device``."""
        counts = trees.num_drafts + 1
        starts = np.concatenate(([0], np.cumsum(counts)))
        req = np.repeat(np.arange(len(counts)), counts)
        node = np.arange(starts[-1]) - starts[req]
        nodes = np.arange(trees.parents.shape[1])
        draft_starts = starts[:-1] - np.arange(len(counts))
        draft = draft_starts[:, None] + nodes[:-1]
        num_drafts = int(trees.num_drafts.sum())
        is_run = nodes <= trees.num_drafts[:, None]
        parents = trees.parents[:, 1:]
        is_sibling = parents[:, :, None] == parents[:, None, :]

        def as_tensor(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(device)

        return cls(
            req=as_tensor(req),
            node=as_tensor(node),
            depth=as_tensor(trees.depths[req, node]),
            row=as_tensor(starts[:-1, None] + np.where(is_run, nodes, 0)),
            draft=as_tensor(np.minimum(draft, max(num_drafts - 1, 0))),
            num_drafts=as_tensor(trees.num_drafts),
            is_run=as_tensor(is_run[:, 1:]),
            earlier_siblings=as_tensor(np.tril(is_sibling, -1)),
            parents=as_tensor(trees.parents),
            depths=as_tensor(trees.depths),
            ancestors=as_tensor(trees.ancestors),
            starts=tuple(starts.tolist()),
        )

    @property
    def num_requests(self) -> int:
        """Number of requests, B."""
        return len(self.starts) - 1

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node, D."""
        return self.ancestors.shape[2] - 1
