"""The tree schedule: a draft tree for each range of batch sizes.

With a larger batch fewer drafts pay. Each tree of a schedule is part of the larger ones, so one
layout serves all of them (`DraftTree.from_stages`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_medusa.errors import UserError, shown
from vllm_medusa.tree.draft_tree import DraftTree, TreePath, read_json

SCHEDULE_FILE_FORMAT = "vllm_medusa.tree_schedule/1"


@dataclass(frozen=True)
class ScheduleEntry:
    """The tree of a range of batch sizes.

    Attributes:
        max_batch_size: last batch size of the range, which begins after the entry before; None:
            all larger ones.
        paths: the tree's paths; empty: nothing is drafted.

    """

    max_batch_size: int | None
    paths: tuple[TreePath, ...]


@dataclass(frozen=True)
class TreeSchedule:
    """Trees by batch size.

    Attributes:
        entries: in rising batch size; the last one also serves all larger batches.

    """

    entries: tuple[ScheduleEntry, ...]

    @classmethod
    def from_entries(
        cls, entries: Sequence[tuple[int | None, Sequence[Sequence[int]]]]
    ) -> TreeSchedule:
        """Build a schedule from ``(max_batch_size, paths)`` pairs.

        Raises:
            UserError: if batch sizes do not rise, a tree is not valid or not part of another one,
                or nothing is drafted at any batch size.

        """
        before = 0
        checked = []
        for index, (size, raw) in enumerate(entries):
            is_last = index == len(entries) - 1
            if size is None and not is_last:
                raise UserError(
                    f"entry {index} of the tree schedule has no max_batch_size but is not the "
                    "last; give it one"
                )
            if size is not None and (type(size) is not int or size <= before):
                raise UserError(
                    f"entry {index} of the tree schedule has max_batch_size={shown(size)}; use "
                    f"integers that rise from entry to entry (here above {before})"
                )
            before = size or before
            paths = DraftTree.from_paths(raw).paths if raw else ()
            checked.append(ScheduleEntry(size, paths))
        schedule = cls(tuple(checked))
        if not any(entry.paths for entry in checked):
            raise UserError("the tree schedule drafts nothing at any batch size; remove it")
        # Raises if a tree is not part of the larger ones.
        schedule.tree()
        return schedule

    def tree(self) -> DraftTree:
        """Return the largest tree, the nodes of the smaller ones first."""
        stages = sorted({entry.paths for entry in self.entries if entry.paths}, key=len)
        return DraftTree.from_stages(stages)

    def sizes(self) -> list[tuple[int, int, int]]:
        """Return ``(first batch size, last batch size, draft nodes)`` of every entry.

        The form of vLLM's ``num_speculative_tokens_per_batch_size``, whose last entry also serves
        all larger batches.
        """
        sizes, first = [], 1
        for entry in self.entries:
            last = first if entry.max_batch_size is None else entry.max_batch_size
            sizes.append((first, last, len(entry.paths)))
            first = last + 1
        return sizes


def nodes_for_batch(sizes: Sequence[tuple[int, int, int]], batch_size: int) -> int:
    """Return how many draft nodes ``sizes`` (`TreeSchedule.sizes`) has for a batch size.

    As in vLLM's ``build_dynamic_sd_schedule_lookup``, a batch size between two ranges or after the
    last one belongs to the range before it.
    """
    return next(nodes for first, _, nodes in reversed(sizes) if first <= batch_size)


def read_schedule_file(path: Path) -> TreeSchedule:
    """Read a schedule file.

    It holds ``{"format": "vllm_medusa.tree_schedule/1", "entries": [{"max_batch_size": 4, "paths":
    [[0], [1], [0, 0]]}, {"max_batch_size": null, "paths": []}]}``.

    Raises:
        UserError: if the file cannot be read or does not hold a valid schedule.

    """
    return _schedule_of(read_json(path, "tree schedule", "calibrate again or remove the file"))


def write_schedule_file(path: Path, schedule: TreeSchedule) -> None:
    """Write a schedule file."""
    entries = [
        {"max_batch_size": entry.max_batch_size, "paths": [list(p) for p in entry.paths]}
        for entry in schedule.entries
    ]
    text = json.dumps({"format": SCHEDULE_FILE_FORMAT, "entries": entries})
    path.write_text(text + "\n", encoding="utf-8")


def _schedule_of(data: Any) -> TreeSchedule:
    if not isinstance(data, dict) or data.get("format") != SCHEDULE_FILE_FORMAT:
        raise UserError(f"not a tree schedule; its format must be {SCHEDULE_FILE_FORMAT!r}")
    entries = data.get("entries")
    if not isinstance(entries, list) or not entries:
        raise UserError("the tree schedule has no entries; calibrate again or remove the file")
    pairs = []
    for index, entry in enumerate(entries):
        if (
            not isinstance(entry, dict)
            or set(entry) != {"max_batch_size", "paths"}
            or not isinstance(entry["paths"], list)
        ):
            raise UserError(
                f"entry {index} of the tree schedule must hold max_batch_size and paths"
            )
        pairs.append((entry["max_batch_size"], entry["paths"]))
    return TreeSchedule.from_entries(pairs)
