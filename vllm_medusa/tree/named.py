"""Trees with a name.

``published.json`` holds the nine 63-node trees of the reference implementation, which were found
for its checkpoints on GPUs. The ``cpu-*`` trees and the default are ours: orders of paths by
decreasing probability under a plain model of head accuracy, so that any number of nodes may be cut
from the front.
"""

from __future__ import annotations

import heapq
import json
from importlib import resources

from vllm_medusa.errors import UserError, shown
from vllm_medusa.tree.draft_tree import DraftTree, TreePath

#: ``tree``: another tree for every request and step.
DYNAMIC = "dynamic"
#: ``tree``: the best that came with the heads, else a default.
STATIC = "static"
#: ``tree``: dynamic trees where they are served and no number of nodes is given, else static ones.
AUTO = "auto"

#: Chance that head 0's guess of each rank is right: an assumption that gives sensible shapes, not a
#: measurement. Heads that come with a calibrated tree do not use it.
_RANK_PROBABILITIES = (0.60, 0.15, 0.07, 0.04, 0.025, 0.018, 0.013, 0.010, 0.008, 0.006)
#: Factor on these chances for each further head.
_DEPTH_DECAY = 0.75

DEFAULT_NUM_DRAFT_TOKENS = 16
_CPU_SIZES = (8, 16, 24, 32)


def tree_names() -> list[str]:
    """Return the names `named_tree` knows."""
    return ["chain", *(f"cpu-{size}" for size in _CPU_SIZES), *sorted(_published())]


def named_tree(name: str, num_heads: int) -> DraftTree:
    """Return the tree called ``name``.

    Args:
        name: one of `tree_names`.
        num_heads: number of heads that the ``chain`` and ``cpu-*`` trees are made for.

    Raises:
        UserError: if there is no tree of that name.

    """
    if name == "chain":
        return DraftTree.chain(num_heads)
    if name.startswith("cpu-") and name[4:].isdigit() and int(name[4:]) in _CPU_SIZES:
        return DraftTree.from_paths(default_paths(num_heads, int(name[4:])))
    published = _published()
    if name in published:
        return DraftTree.from_paths([int(rank) for rank in path] for path in published[name])
    raise UserError(
        f"there is no tree named {shown(name)}; use 'auto', 'dynamic', 'static', one of "
        f"{', '.join(tree_names())}, the path of a tree file, or a list of paths"
    )


def default_paths(num_heads: int, num_draft_tokens: int) -> list[TreePath]:
    """Return the most probable paths of the documented default, the most probable first.

    A path's probability is the product over its depths of the rank's probability, decayed by depth.
    """
    chosen: list[TreePath] = []
    frontier: list[tuple[float, TreePath]] = [(-_RANK_PROBABILITIES[0], (0,))]
    while frontier and len(chosen) < num_draft_tokens:
        negative, path = heapq.heappop(frontier)
        chosen.append(path)
        rank, depth = path[-1], len(path)
        if rank + 1 < len(_RANK_PROBABILITIES):
            ratio = _RANK_PROBABILITIES[rank + 1] / _RANK_PROBABILITIES[rank]
            heapq.heappush(frontier, (negative * ratio, (*path[:-1], rank + 1)))
        if depth < num_heads:
            child = negative * _RANK_PROBABILITIES[0] * _DEPTH_DECAY**depth
            heapq.heappush(frontier, (child, (*path, 0)))
    return chosen


def _published() -> dict[str, list[str]]:
    text = resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8")
    trees: dict[str, list[str]] = json.loads(text)["trees"]
    return trees
