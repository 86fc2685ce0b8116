"""Format, lint and types are tests too, so that `pytest` alone is the whole suite."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize("command", ["ruff format --check", "ruff check", "mypy"])
def test_tool_has_nothing_to_say(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.fail(f"{command}:\n{done.stdout}{done.stderr}", pytrace=False)
