"""A signal ends a run of the tests: at once, and with its engines and fixtures closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]

ENGINE_PLUGINS = ["-p", "tests.integration.conftest"]
ENGINE = """
from pathlib import Path
from tests.integration.conftest import greedy, random_prompts

def test_engine(engine):
    with engine() as llm:
        try:
            Path("begun").touch()
            while True:
                greedy(llm, random_prompts(2))
        finally:
            Path("closed").touch()
"""
NO_ENGINE = """
import time
from pathlib import Path

def test_nothing():
    try:
        Path("begun").touch()
        time.sleep(600)
    finally:
        Path("closed").touch()
"""


@pytest.mark.parametrize(
    ("source", "arguments", "number"),
    [
        pytest.param(
            ENGINE, ENGINE_PLUGINS, signal.SIGINT, marks=pytest.mark.engine, id="SIGINT-engine"
        ),
        pytest.param(NO_ENGINE, [], signal.SIGTERM, id="SIGTERM"),
        pytest.param(NO_ENGINE, ["-n", "1"], signal.SIGTERM, id="SIGTERM-worker"),
    ],
)
def test_a_signal_ends_the_run(
    tmp_path: Path, source: str, arguments: list[str], number: signal.Signals
) -> None:
    """Even where the shell has both signals ignored, as it has for a job in the background."""
    (tmp_path / "test_endless.py").write_text(source)
    pytest_command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", *arguments]
    with subprocess.Popen(
        ["sh", "-c", "trap '' INT TERM; exec \"$@\"", "sh", *pytest_command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            while not (tmp_path / "begun").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.1)
            process.send_signal(number)
            out, _ = process.communicate(timeout=60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == pytest.ExitCode.INTERRUPTED, out
    assert (tmp_path / "closed").exists(), out
