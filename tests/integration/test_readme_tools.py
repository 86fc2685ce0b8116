"""The README's commands of ``vllm-medusa`` run as they stand there, one after the other.

In a file of its own, and the first of those with engines: it takes longest.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.test_readme import ENVIRONMENT, ROOT, by_program

pytestmark = pytest.mark.engine

EAGER = ["--llm-options", '{"enforce_eager": true}']
#: What makes the tools' commands quick: less work, the same path through the program.
QUICKER = {
    "distill": ["--llm-options", '{"enforce_eager": true, "dtype": "float32"}'],
    "train": ["--steps", "5"],
    "calibrate": [
        *(*EAGER, "--dtype", "float32"),
        *("--sizes", "4,8", "--cost-sizes", "8", "--batch-sizes", "1", "--rounds", "1"),
    ],
    "trees": ["--dtype", "float32", "--steps", "1"],
    "bench": [
        *(*EAGER, "--dtype", "float32"),
        *("--variants", "tree", "--batch-sizes", "1", "--rounds", "1", "--max-tokens", "16"),
        *("--out", "results"),
    ],
}


def test_tools(tmp_path: Path) -> None:
    """In a folder beside the repository's, where what they write goes."""
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    for command in by_program("vllm-medusa"):
        subprocess.run(
            [*command, *QUICKER.get(command[1], [])],
            cwd=tmp_path,
            check=True,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
        )
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"demo", "converted-heads", "answers", "my-heads", "results", "trees.svg"}
