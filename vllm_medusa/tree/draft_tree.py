"""The draft tree: a set of paths closed under parents, in an order whose prefixes are trees.

A node is named by its path, the tuple of per-head ranks from the root: node ``(0, 2)`` holds the
third-best guess of head 1 below the best guess of head 0 (paper, arXiv 2401.10774, section 2.1.2;
the path notation is that of the reference's ``medusa_choices``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_medusa.errors import UserError, shown

TreePath = tuple[int, ...]

TREE_FILE_FORMAT = "vllm_medusa.tree/1"
#: vLLM verifies at most this many draft tokens of a request in one step (``MAX_SPEC_LEN``, less
#: the root's own token).
MAX_DRAFT_TOKENS = 127


@dataclass(frozen=True)
class DraftTree:
    """A valid draft tree.

    Attributes:
        paths: the draft nodes (without the root), every parent before its children. Node ``i`` of
            every tensor of this project is ``paths[i - 1]``; node 0 is the root. The order is
            depth-first, which is the lexicographic order of the paths; of a tree in stages
            (`from_stages`) each stage's new nodes are in that order.

    """

    paths: tuple[TreePath, ...]

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> DraftTree:
        """Build a tree from its paths, in any order.

        Raises:
            UserError: if a path is empty, repeats, has a negative or non-integer rank or lacks its
                parent, or if the tree has no node or more than ``MAX_DRAFT_TOKENS``.

        """
        nodes: set[TreePath] = set()
        for raw in paths:
            path = _checked_path(raw)
            if path in nodes:
                raise UserError(f"tree path {_shown(path)} is given twice; remove one of them")
            nodes.add(path)
        if not nodes:
            raise UserError("the tree has no paths; give at least [[0]], or use tree='chain'")
        for path in nodes:
            if len(path) > 1 and path[:-1] not in nodes:
                raise UserError(
                    f"tree path {_shown(path)} has no parent; add the path {_shown(path[:-1])}"
                )
        if len(nodes) > MAX_DRAFT_TOKENS:
            raise UserError(
                f"the tree has {len(nodes)} nodes; vLLM verifies at most {MAX_DRAFT_TOKENS} draft "
                "tokens a step, so remove paths"
            )
        return cls(tuple(sorted(nodes)))

    @classmethod
    def from_stages(cls, stages: Iterable[Iterable[Sequence[int]]]) -> DraftTree:
        """Build a tree whose first nodes are each of the given trees.

        A request that runs only the first ``n`` nodes of the result runs a stage of ``n`` nodes.

        Args:
            stages: paths of each stage, in any order; the smallest stage first.

        Raises:
            UserError: if a stage is not a tree, or lacks a path of the stage before.

        """
        ordered: list[TreePath] = []
        for stage in stages:
            tree = cls.from_paths(stage)
            missing = next((path for path in ordered if path not in tree.paths), None)
            if missing is not None:
                raise UserError(
                    f"the tree of {tree.num_draft_tokens} nodes lacks the path {_shown(missing)} "
                    f"of the tree of {len(ordered)} before it; add the path, so that each tree "
                    "holds the smaller ones"
                )
            ordered += [path for path in tree.paths if path not in ordered]
        return cls(tuple(ordered))

    @classmethod
    def chain(cls, length: int) -> DraftTree:
        """Return the top-1 chain of ``length`` draft tokens."""
        return cls.from_paths([(0,) * depth for depth in range(1, length + 1)])

    @property
    def num_draft_tokens(self) -> int:
        """Number of draft nodes, without the root."""
        return len(self.paths)

    @cached_property
    def depth(self) -> int:
        """Depth of the deepest node: the number of heads the tree needs."""
        return max(len(path) for path in self.paths)

    @cached_property
    def top_k(self) -> int:
        """Number of guesses the tree needs from each head."""
        return 1 + max(path[-1] for path in self.paths)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Parent node index of each node; the root's is -1."""
        index = {path: node for node, path in enumerate(self.paths, start=1)}
        index[()] = 0
        return (-1, *(index[path[:-1]] for path in self.paths))

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Node indices of the leaves, in the order of the nodes."""
        inner = set(self.parents)
        return tuple(node for node in range(1, len(self.paths) + 1) if node not in inner)

    def check_heads(self, num_heads: int) -> None:
        """Raise `UserError` if the tree is deeper than there are heads."""
        if self.depth <= num_heads:
            return
        deepest = next(path for path in self.paths if len(path) > num_heads)
        raise UserError(
            f"the tree is {self.depth} deep (path {_shown(deepest)}) but the heads are "
            f"{num_heads}; use heads trained for more positions or a tree without that path"
        )

    def check_vocab(self, vocab_size: int) -> None:
        """Raise `UserError` if the tree needs more guesses of a head than it has tokens."""
        if self.top_k > vocab_size:
            raise UserError(
                f"the tree asks for rank {self.top_k - 1} but a head knows {vocab_size} tokens; "
                "remove the paths with larger ranks"
            )


def _shown(path: Sequence[int]) -> str:
    return shown(list(path))


def _checked_path(raw: Sequence[int]) -> TreePath:
    """Return ``raw`` as a path, or raise `UserError`."""
    if isinstance(raw, (str, bytes)) or not isinstance(raw, Sequence):
        raise UserError(f"tree path {shown(raw)} must be a list of ranks such as [0, 2]")
    for rank in raw:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise UserError(f"tree path {_shown(raw)} has rank {shown(rank)}; use 0, 1, 2, ...")
    if not raw:
        raise UserError("the tree has an empty path; the root is implied, remove it")
    return tuple(raw)


def read_tree_file(path: Path) -> list[list[int]]:
    """Read the paths of a tree file, in the file's order (the most probable first).

    The file holds ``{"format": "vllm_medusa.tree/1", "paths": [[0], [1], [0, 0]]}`` or the bare
    list of paths.

    Raises:
        UserError: if the file cannot be read or does not hold a list of paths.

    """
    data = read_json(path, "tree file", "write it again or give its paths")
    if isinstance(data, dict):
        if data.get("format") != TREE_FILE_FORMAT:
            raise UserError(
                f"the tree file {path} has format {shown(data.get('format'))}; "
                f"use {TREE_FILE_FORMAT!r}, or a bare list of paths"
            )
        data = data.get("paths")
    if not isinstance(data, list):
        raise UserError(
            f"the tree file {path} holds no list of paths; give one such as [[0], [1], [0, 0]]"
        )
    return data


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        what: what the file is, for the error.
        remedy: what to do if it is not JSON, for the error.

    Raises:
        UserError: if it cannot be read or is not JSON.

    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the {what} {_name(path)}: {error.strerror}; check the path"
        ) from None
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"the {what} {_name(path)} is not JSON ({reason}); {remedy}")


def _name(path: Path) -> str:
    """Return the path of a file as a message shows it; it may be longer than other values."""
    return shown(str(path), 260).strip("'")


def write_tree_file(path: Path, paths: Iterable[Sequence[int]]) -> None:
    """Write ``paths``, the most probable first, so that each prefix is itself a tree."""
    text = json.dumps({"format": TREE_FILE_FORMAT, "paths": [list(p) for p in paths]})
    path.write_text(text + "\n", encoding="utf-8")
