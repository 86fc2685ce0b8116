"""Which trees requests draft: the same at every step, or the nodes that the heads deem likely."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from vllm_medusa.config import MedusaConfig
from vllm_medusa.draft.superset import Superset
from vllm_medusa.kernels.best_first import RankPaths, best_first
from vllm_medusa.plugin.compat import plugin_logger
from vllm_medusa.tree.draft_tree import DraftTree

logger = plugin_logger(__name__)


class Shape(IntEnum):
    """What a request's trees look like."""

    TREE = 0
    """The static tree. Of dynamic trees, one for grammars, which need its parents on the host."""
    CHAIN = 1
    """The first path, filled up with guesses that nobody accepts unless they are right."""
    BEST_FIRST = 2
    """Of dynamic trees."""


class FixedTrees:
    """A static tree and its first path as tensors, both of N nodes.

    Args:
        tree: of N nodes at most; what it lacks is filled up with nodes that are never accepted.
        num_nodes: N.
        device: of the tensors.

    """

    def __init__(self, tree: DraftTree, num_nodes: int, device: torch.device) -> None:
        missing = num_nodes - tree.num_draft_tokens
        first = [i for i, path in enumerate(tree.paths) if not any(path)]
        parents = [[0, *tree.parents[1:], *[-1] * missing], [0, *range(num_nodes)]]
        sources = [
            [*range(tree.num_draft_tokens), *[0] * missing],
            first + [0] * (num_nodes - len(first)),
        ]
        self._on_host = [tuple(max(parent, 0) for parent in row[1:]) for row in parents]
        self._parents = torch.tensor(parents, dtype=torch.int64, device=device)
        self._sources = torch.tensor(sources, dtype=torch.int64, device=device)

    def parents_of(self, shape: int) -> tuple[int, ...]:
        """Return the parents of the N nodes; nothing of best-first trees."""
        return () if shape == Shape.BEST_FIRST else self._on_host[shape]

    def whole(self, num_reqs: int) -> Tensor:
        """[B, N + 1] parents of the tree."""
        return self._parents[:1].expand(num_reqs, -1)

    def choose(self, shapes: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return [B, N + 1] parents and [B, N] tokens from [B] shapes and the tree's tokens."""
        row = shapes.clamp(max=Shape.CHAIN)
        return self._parents[row], tokens.gather(1, self._sources[row])


class BestFirst:
    """The heads' dynamic trees: of a few hundred rank paths the N likeliest, on the device.

    Args:
        config: its trees are dynamic.
        superset: the rank paths.
        device: of the tensors.

    Attributes:
        num_nodes: N, the same for every request.
        fixed_tree: of paths of the superset; what a request gets that cannot have a tree of its
            own.
        max_depth: of both.

    """

    def __init__(self, config: MedusaConfig, superset: Superset, device: torch.device) -> None:
        self.num_nodes = config.limits.max_nodes
        paths, static = superset.paths(), set(config.tree.paths)
        # Those of the heads' own tree first. A rank costs as much as a step down, so that parents
        # come before their children.
        likely = sorted(paths, key=lambda path: (path not in static, sum(path) + len(path), path))
        self.fixed_tree = DraftTree.from_paths(likely[: self.num_nodes])
        self.max_depth = max(map(len, paths))
        self._superset, self._device = superset, device
        self._paths: RankPaths
        self._fixed_cells: tuple[Tensor, Tensor]
        logger.info(
            "Medusa: dynamic trees on Model Runner V2 are the heads' %d likeliest nodes of %d rank "
            "paths, up to depth %d, the same number at every step; text as a source, learning and "
            "sizes by cost are V1's",
            self.num_nodes,
            len(paths),
            self.max_depth,
        )

    def read_tables(self, *, by_parent: bool) -> None:
        """Find the paths in the heads' T tables of guesses, once it is known which these are.

        Args:
            by_parent: one for each path that has children, which is what a selector makes; if not,
                one for each head.

        """
        superset = self._superset.by_parent() if by_parent else self._superset
        paths = superset.paths()
        tables, ranks = np.divmod(superset.cells, superset.num_guesses)
        self._paths = RankPaths.build(paths, tables.tolist(), self._device)
        fixed = [paths.index(path) for path in self.fixed_tree.paths]
        self._fixed_cells = (
            torch.from_numpy(tables[fixed]).to(self._device),
            torch.from_numpy(ranks[fixed]).to(self._device),
        )

    def draft(self, log_probs: Tensor, guesses: Tensor) -> tuple[Tensor, Tensor]:
        """Return [B, N + 1] parents and [B, N] tokens of the heads' [T, B, k] guesses."""
        return best_first(log_probs, guesses, self._paths, self.num_nodes)

    def fixed_tokens(self, guesses: Tensor) -> Tensor:
        """Return the tokens, [B, nodes], of the fixed tree by the heads' [T, B, k] guesses."""
        tables, ranks = self._fixed_cells
        return guesses[tables, :, ranks].T
