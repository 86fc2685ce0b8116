"""`vllm-medusa trees`: what the engine drafted and accepted, as a picture."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command_line import DEMO_HEADS, DEMO_MODEL, REPO
from vllm_medusa.cli import main as cli
from vllm_medusa.cli import trees as trees_command
from vllm_medusa.reporting.tree_pictures import VerifiedTree

PROMPT = json.loads((REPO / "demo" / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
OPTIONS = {"max_model_len": 512, "block_size": 32, "kv_cache_memory_bytes": 2**27}
DRAFTS = {"measure_costs": False, "max_nodes": 8, "learn": False}


def draw(*arguments: Any, drafts: dict[str, Any] = DRAFTS) -> int:
    given = [
        *("--model", DEMO_MODEL, "--heads", DEMO_HEADS, "--dtype", "float32"),
        *("--llm-options", json.dumps(OPTIONS), "--speculative-options", json.dumps(drafts)),
    ]
    return cli.main(["trees", *map(str, [*given, *arguments])])


@pytest.mark.engine
@pytest.mark.slow
def test_steps_of_a_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[VerifiedTree] = []
    verified = trees_command.verified_trees

    def keep(given: trees_command.TreesSettings) -> list[VerifiedTree]:
        found.extend(verified(given))
        return found

    monkeypatch.setattr(trees_command, "verified_trees", keep)
    out = tmp_path / "trees.svg"
    assert draw("--prompt", PROMPT, "--steps", 3, "--skip", 1, "--out", out) == 0
    printed = capsys.readouterr().out
    assert len(found) > 10
    for tree, following in pairwise(found):
        # Every step drafts here, and each goes on where the one before ended.
        assert following.step == tree.step + 1
        assert following.root == tree.sampled[-1]
    for tree in found:
        assert [tree.tokens[node - 1] for node in tree.accepted] == tree.sampled[:-1]
        assert 0 < len(tree.tokens) == len(tree.probability) == len(tree.sources) <= 8
        above = [1.0, *tree.probability]
        assert all(p <= above[q] for p, q in zip(tree.probability, tree.parents, strict=True))
        assert all(names and set(names) <= {"heads", "text"} for names in tree.sources)
    assert sum(len(tree.accepted) for tree in found) > len(found)
    lines = [
        f"step {tree.step}: {len(tree.accepted)} of {len(tree.tokens)} draft tokens accepted"
        for tree in found[1:4]
    ]
    assert printed.splitlines() == [*lines, f"wrote {out}"]
    picture = out.read_text()
    assert all(line in picture for line in lines)
    assert all(f">{p:.2f}</text>" in picture for tree in found[1:4] for p in tree.probability)


def test_text_without_drafts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees_command, "verified_trees", lambda given: [])
    out = tmp_path / "trees.png"
    assert draw("--prompt", "def", "--out", out) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vllm-medusa trees: error: no step of this text drafted a tree")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "trees.bmp"], "--out trees.bmp: its name must end in .png or .svg"),
        (["--out", "nowhere/trees.png"], "--out nowhere/trees.png: no file can be written there"),
        (["--steps", "0"], "--steps 0: must be above 0"),
        (["--skip", "-1"], "--skip -1: must be at least 0"),
        (["--llm-options", '{"dtype": "x"}'], "--llm-options: 'dtype' is set by --dtype"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert draw("--prompt", "def", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"vllm-medusa trees: error: {message}")
