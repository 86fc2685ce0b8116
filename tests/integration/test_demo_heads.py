"""The shipped heads are as good as the reports beside them say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command_line import DEMO_HEADS, DEMO_MODEL, REPO
from vllm_medusa.cli.main import main

pytestmark = pytest.mark.engine

#: By how much a figure of 48 prompts may differ from one of 156: about two standard errors.
ACCURACY_MARGIN, LENGTH_MARGIN = 0.06, 0.08


def calibration(path: Path) -> dict[tuple[str, bool], dict[str, Any]]:
    """The figures of a calibration, by text and whether looping text counts."""
    report = json.loads((path / "calibration.json").read_text())
    return {(part["text"], part["with_loops"]): part for part in report["sections"]}


def test_the_heads_reach_what_is_reported(tmp_path: Path) -> None:
    """On the demo's prompts, which nothing was trained on or calibrated with."""
    arguments = [
        *("calibrate", DEMO_HEADS, "--model", DEMO_MODEL, "--out", tmp_path),
        *("--prompts", REPO / "demo" / "prompts.jsonl", "--max-prompts", "48"),
        *("--sizes", "16,32", "--no-step-costs", "--dtype", "float32"),
        *("--llm-options", json.dumps({"enforce_eager": True})),
    ]
    assert main([str(argument) for argument in arguments]) == 0
    reported, found = calibration(DEMO_HEADS), calibration(tmp_path)
    assert found.keys() == reported.keys()
    for key, expected in reported.items():
        for top, shares in expected["accuracy"].items():
            for share, got in zip(shares, found[key]["accuracy"][top], strict=True):
                assert got > share - ACCURACY_MARGIN, (key, top)
        lengths = {
            size["size"]: size["predicted"]["value"] for size in expected["methods"]["joint"]
        }
        for size in found[key]["methods"]["joint"]:
            assert size["in_sample"] > (1 - LENGTH_MARGIN) * lengths[size["size"]], key


def test_the_demo_is_small_enough() -> None:
    def size(*folders: str) -> int:
        files = [path for name in folders for path in (REPO / "demo" / name).rglob("*")]
        return sum(path.stat().st_size for path in files if path.is_file())

    assert size("model", "heads") <= 16e6
    assert size("") <= 23e6
