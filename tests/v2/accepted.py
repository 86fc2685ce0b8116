"""What the steps of engines accept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class Accepted:
    """What steps accepted.

    Attributes:
        nodes: draft nodes that any step accepted.
        num_forks: accepted nodes that were not the first child of their parent.

    """

    nodes: set[int] = field(default_factory=set)
    num_forks: int = 0

    def count(self, parents: list[int], path: list[int]) -> None:
        """Count a request's step; parents of all nodes, the root's first, and the way down."""
        for node in path:
            self.nodes.add(node)
            self.num_forks += parents.index(parents[node], 1) != node


@contextmanager
def accepted() -> Iterator[Accepted]:
    """Count what engines of this process accept."""
    from vllm_medusa.plugin.worker.v2 import sampler

    found = Accepted()
    original = sampler.TreeSampler.__call__

    def call(self: Any, logits: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        parents = self._states.parents[input_batch.idx_mapping].tolist()
        output = original(self, logits, input_batch, *args, **kwargs)
        lengths = self.acceptance.length.tolist()
        for tree, path, length in zip(parents, self.acceptance.path.tolist(), lengths, strict=True):
            found.count(tree, path[1 : length + 1])
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler.TreeSampler, "__call__", call)
        yield found
