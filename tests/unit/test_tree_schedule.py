"""Tree schedules: what is accepted, what it becomes, its file."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_medusa.errors import UserError
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.schedule import (
    SCHEDULE_FILE_FORMAT,
    TreeSchedule,
    nodes_for_batch,
    read_schedule_file,
    write_schedule_file,
)

LARGE = [[0], [0, 0], [1], [0, 0, 0], [0, 1]]
SMALL = [[0], [1]]


def test_a_schedule_becomes_one_tree_and_sizes() -> None:
    schedule = TreeSchedule.from_entries([(1, LARGE), (4, SMALL), (9, [[0]]), (None, [])])
    tree = schedule.tree()
    assert tree.paths == ((0,), (1,), (0, 0), (0, 0, 0), (0, 1))
    assert schedule.sizes() == [(1, 1, 5), (2, 4, 2), (5, 9, 1), (10, 10, 0)]
    assert TreeSchedule.from_entries([(None, SMALL)]).sizes() == [(1, 1, 2)]


def test_nodes_by_batch_size() -> None:
    sizes = [(1, 2, 5), (5, 8, 3), (10, 10, 0)]
    found = [nodes_for_batch(sizes, batch_size) for batch_size in (1, 2, 3, 4, 5, 8, 9, 10, 99)]
    assert found == [5, 5, 5, 5, 3, 3, 3, 0, 0]


def test_trees_may_grow_with_the_batch() -> None:
    schedule = TreeSchedule.from_entries([(1, SMALL), (4, LARGE)])
    assert schedule.tree().num_draft_tokens == 5
    assert schedule.sizes() == [(1, 1, 2), (2, 4, 5)]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(4, LARGE), (4, SMALL)], r"entry 1 .* max_batch_size=4; use integers .* above 4"),
        ([(0, LARGE)], "max_batch_size=0"),
        ([(True, LARGE)], "max_batch_size=True"),
        ([(None, LARGE), (4, SMALL)], "entry 0 .* is not the last"),
        ([(4, [])], "drafts nothing at any batch size"),
        ([(4, LARGE), (None, [[2]])], r"lacks the path \[2\] of the tree of 1"),
        ([(4, [[0, 0]])], "has no parent"),
    ],
)
def test_mistakes_are_named(entries: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        TreeSchedule.from_entries(entries)
    assert "\n" not in str(caught.value)


def test_the_file_holds_the_schedule(tmp_path: Path) -> None:
    schedule = TreeSchedule.from_entries([(2, LARGE), (None, [])])
    write_schedule_file(tmp_path / "schedule.json", schedule)
    assert read_schedule_file(tmp_path / "schedule.json") == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON .*nested too deeply"),
        ("[]", "not a tree schedule"),
        ('{"format": "other"}', "not a tree schedule; its format must be"),
        (json.dumps({"format": SCHEDULE_FILE_FORMAT, "entries": []}), "has no entries"),
        (
            json.dumps({"format": SCHEDULE_FILE_FORMAT, "entries": [{"paths": [[0]]}]}),
            "entry 0 of the tree schedule must hold max_batch_size and paths",
        ),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_schedule_file(path)
    with pytest.raises(UserError, match="cannot read the tree schedule"):
        read_schedule_file(tmp_path / "none.json")


def test_stages_that_do_not_nest_are_named() -> None:
    with pytest.raises(UserError, match=r"the tree of 2 nodes lacks the path \[2\] of the tree"):
        DraftTree.from_stages([[[2]], [[0], [1]]])
