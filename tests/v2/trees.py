"""Trees and settings of the V2 tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_medusa.tree.named import default_paths

NUM_HEADS = 4


def spec(heads: Path, num_nodes: int = 16, **options: Any) -> dict[str, Any]:
    """A ``speculative_config`` with a tree of so many nodes."""
    tree = [list(path) for path in default_paths(NUM_HEADS, num_nodes)]
    return {"method": "medusa", "model": str(heads), "tree": tree, **options}


def dynamic(heads: Path, **options: Any) -> dict[str, Any]:
    """A ``speculative_config`` with dynamic trees of 12 nodes."""
    settings = {"tree": "dynamic", "max_nodes": 12, **options}
    return {"method": "medusa", "model": str(heads), **settings}
