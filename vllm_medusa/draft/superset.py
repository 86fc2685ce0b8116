"""The rank paths from which the heads' trees are chosen, fixed when the engine starts.

A node of the heads is named by its rank path, as in `vllm_medusa.tree`. The probabilities of the
paths change from step to step, but the probable ones are nearly always among the same few hundred.
So each step works on the same paths: every probability is a gather, and no loop goes over nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_medusa.draft.types import Floats, Ints
from vllm_medusa.errors import UserError, shown
from vllm_medusa.tree.draft_tree import DraftTree, TreePath

#: Most paths of a superset: more paths take time at every step and are never drafted.
MAX_PATHS = 256


@dataclass(frozen=True)
class Superset:
    """S rank paths of up to K heads with k guesses each, in the order of their depths.

    The guesses come in T tables of k each. Medusa heads have one table each, whatever the path;
    heads with a selector have one for each path that has children (`by_parent`).

    Attributes:
        parents: [S] place of each path's parent; S is the root.
        cells: [S] place of each path's last guess in the [T, k] guesses.
        tables: [K, S + 2] table of the guesses at depth 1, 2, ... below each place; -1 is none. The
            places are those of `children`.
        heads: [T] head of each table.
        depths: [S] from 1.
        levels: [K + 1] where the paths of depth 1, 2, ... begin; the last is S.
        children: [S + 2, k] place of each path's child by rank, -1 for none; row S is the root's,
            the last row is empty.

    """

    parents: Ints
    cells: Ints
    tables: Ints
    heads: Ints
    depths: Ints
    levels: Ints
    children: Ints

    @classmethod
    def from_paths(
        cls, paths: Iterable[Sequence[int]], num_heads: int, num_guesses: int
    ) -> Superset:
        """Build the superset of the first `MAX_PATHS` of the given paths, the most probable first.

        Raises:
            UserError: if the paths are not a tree or go beyond the heads or their guesses.

        """
        first = list(paths)[:MAX_PATHS]
        for path in first:
            if not isinstance(path, Sequence) or not all(type(r) is int and r >= 0 for r in path):
                raise UserError(
                    f"the path {shown(path)} of the superset must be a list of ranks such as [0, 2]"
                )
        ordered = sorted({tuple(path) for path in first}, key=lambda path: (len(path), path))
        place = {path: index for index, path in enumerate(ordered)} | {(): len(ordered)}
        for path in ordered:
            if not path or path[:-1] not in place:
                raise UserError(f"the path {list(path)} of the superset has no parent; add it")
            if len(path) > num_heads or max(path) >= num_guesses:
                raise UserError(
                    f"the path {list(path)} of the superset needs more than {num_heads} heads or "
                    f"{num_guesses} guesses each; remove it"
                )
        children = np.full((len(ordered) + 2, num_guesses), -1, dtype=np.int64)
        for path in ordered:
            children[place[path[:-1]], path[-1]] = place[path]
        depths = np.array([len(path) for path in ordered], dtype=np.int64)
        heads = np.arange(num_heads)
        cells = [num_guesses * (len(path) - 1) + path[-1] for path in ordered]
        return cls(
            parents=np.array([place[path[:-1]] for path in ordered], dtype=np.int64),
            cells=np.array(cells, dtype=np.int64),
            tables=np.repeat(heads[:, None], len(children), axis=1),
            heads=heads,
            depths=depths,
            levels=np.searchsorted(depths, np.arange(1, num_heads + 2)),
            children=children,
        )

    @classmethod
    def from_product(cls, probability: Floats, num_paths: int = MAX_PATHS) -> Superset:
        """Build the superset of the paths with the largest product of probabilities.

        Args:
            probability: [K, k] of each head's guess of each rank.
            num_paths: how many paths, `MAX_PATHS` at most.

        """
        num_heads, num_guesses = probability.shape
        size = min(num_paths, MAX_PATHS)
        found: list[tuple[float, tuple[int, ...]]] = []
        beam: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
        for row in probability.tolist():
            longer = [(p * q, (*path, rank)) for p, path in beam for rank, q in enumerate(row)]
            # A path among the most probable of its depth has a parent among the most probable of
            # its depth.
            beam = sorted(longer, key=lambda item: (-item[0], item[1]))[:size]
            found += beam
        found.sort(key=lambda item: (-item[0], len(item[1]), item[1]))
        return cls.from_paths([path for _, path in found[:size]], num_heads, num_guesses)

    @classmethod
    def of_tree(cls, tree: DraftTree) -> Superset:
        """Build the superset that is a static tree."""
        return cls.from_paths(tree.paths, tree.depth, tree.top_k)

    def cut_to_depth(self, depth: int) -> Superset:
        """Return the superset without the paths deeper than ``depth``."""
        paths = [path for path in self.paths() if len(path) <= depth]
        return Superset.from_paths(paths, self.num_heads, self.num_guesses)

    def by_parent(self) -> Superset:
        """Return the superset for guesses that depend on the path above: a table for each parent.

        The root's table is the first; the others follow in the order of their places.
        """
        parents, ranks = self.as_nodes()
        numbers, table = np.unique(parents, return_inverse=True)
        places = (numbers - 1) % (len(self) + 1)
        heads = np.append(self.depths, 0)[places]
        tables = np.full_like(self.tables, -1)
        tables[heads, places] = np.arange(len(places))
        cells = self.num_guesses * table + ranks
        return replace(self, cells=cells, tables=tables, heads=heads)

    def as_nodes(self) -> tuple[Ints, Ints]:
        """Return [S] the parents as a draft has them, where 0 is the root, and [S] the ranks."""
        return (self.parents + 1) % (len(self) + 1), self.cells % self.num_guesses

    def __len__(self) -> int:
        return len(self.parents)

    def paths(self) -> list[TreePath]:
        """Return the rank paths."""
        paths: list[TreePath] = []
        for parent, cell in zip(self.parents.tolist(), self.cells.tolist(), strict=True):
            above = () if parent == len(self) else paths[parent]
            paths.append((*above, cell % self.num_guesses))
        return paths

    @property
    def num_heads(self) -> int:
        """Heads that the paths may use."""
        return len(self.levels) - 1

    @property
    def num_guesses(self) -> int:
        """Guesses of each head that the paths may use."""
        return int(self.children.shape[1])
