"""Pictures of draft trees."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_medusa.reporting.tree_pictures import VerifiedTree, draw_trees

#: Token i is the text ``t<i>``.
TREE = VerifiedTree(
    step=3,
    root=7,
    tokens=[1, 2, 3, 1],
    parents=[0, 1, 1, 0],
    sampled=[1, 3, 9],
    probability=[0.8, 0.5, 0.25, 0.125],
    sources=[["heads", "text"], ["heads"], ["shared_text"], ["heads"]],
)


def decode(tokens: list[int]) -> str:
    return "".join(f"t{token}" for token in tokens)


def test_accepted_path_and_places() -> None:
    assert TREE.accepted == [1, 3]
    assert TREE.depths == [0, 1, 2, 2, 1]
    # Leaves 2, 3 and 4 in rows; node 1 amid its two, the root amid nodes 1 and 4.
    assert TREE.heights == [-1.25, -0.5, 0.0, -1.0, -2.0]


def test_what_the_picture_says(tmp_path: Path) -> None:
    out = tmp_path / "tree.svg"
    draw_trees([TREE, TREE], decode, out)
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", out.read_text())
    title = "step 3: 2 of 4 draft tokens accepted: 3 tokens in one step"
    for text, count in (
        (title, 2),
        ("'t1'", 4),
        ("0.25", 2),
        ("then 't9', the target's own", 2),
        ("heads and text", 1),
        ("shared text", 1),
        ("accepted", 1),
    ):
        assert texts.count(text) == count, text
    assert "text" not in texts
    first = out.read_bytes()
    draw_trees([TREE, TREE], decode, out)
    assert out.read_bytes() == first


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_nothing_but_tokens_and_parents_is_needed(tmp_path: Path, kind: str) -> None:
    events = [
        {"text": "x", "num_tokens": 1},
        {"step": 1, "root": 7, "tokens": [1], "parents": [0], "sampled": [2]},
    ]
    (tree,) = VerifiedTree.of_events(events)
    out = tmp_path / f"tree.{kind}"
    # Two dollar signs would be a formula.
    draw_trees([tree], lambda tokens: f"$_{tokens[0]}$", out)
    assert out.stat().st_size > 1000
