"""Every command and program of the README runs as it stands there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.command_line import environment, run_tool
from tests.integration.test_serve import Server, free_port, wait_until_ready

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def commands() -> list[list[str]]:
    """The shell commands, without their comments."""
    joined = "\n".join(text for kind, text in BLOCKS if kind == "bash").replace("\\\n", " ")
    lines = (shlex.split(line, comments=True) for line in joined.splitlines())
    return [line for line in lines if line]


def by_program(program: str) -> list[list[str]]:
    return [command for command in commands() if command[0] == program]


def test_all_commands_are_covered() -> None:
    programs = {command[0] for command in commands()}
    assert programs == {"make", "pip", "source", "vllm", "curl", "vllm-medusa"}
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "text"}


@pytest.mark.parametrize("command", by_program("make"), ids=" ".join)
def test_make_targets_exist(command: list[str]) -> None:
    """The targets themselves are what continuous integration runs; the demo is run below."""
    subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_the_demo(tmp_path: Path) -> None:
    """What ``make demo`` runs once everything is set up, with a smaller model and less text."""
    picture = tmp_path / "tree.png"
    sizes = [
        "--tree",
        "4",
        "--megabytes",
        "60",
        "--prompts",
        "2",
        "--max-tokens",
        "32",
        "--rounds",
        "1",
    ]
    command = [sys.executable, "examples/demo.py", *sizes, "--picture", str(picture)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert re.search(r"[12] of 2 texts are identical, token for token", run.stdout)
    per_step = {
        name: float(re.search(rf"^. {name} +\| +([\d.]+) ", run.stdout, re.M)[1])
        for name in ("without speculation", "with a tree of 4 nodes")
    }
    assert per_step["without speculation"] == 1
    assert per_step["with a tree of 4 nodes"] > 1.2
    assert re.search(r"over those without: [\d.]+ \(median of 1 rounds", run.stdout)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_room_is_in_the_file_tree() -> None:
    (tree,) = (text for kind, text in BLOCKS if kind == "text" and "vllm_medusa/" in text)
    package = ROOT / "vllm_medusa"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    rooms |= {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert {room for room in rooms if not re.search(rf"\b{re.escape(room)}\b", tree)} == set()


def test_installing_names_this_package() -> None:
    assert by_program("pip") == [["pip", "install", "vllm-medusa"]]


@pytest.mark.parametrize("program", [text for kind, text in BLOCKS if kind == "python"])
def test_programs(program: str, tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(program, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip()


TOOLS_ON_THE_DEMO = {"inspect", "convert", "trees", "bench"}
#: The others, in `test_readme_tools.py`.
NEW_HEADS = {"distill", "train", "calibrate"}
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


def run_tools(names: set[str], folder: Path) -> set[str]:
    """Run the commands of these names in a folder; return what is in it then."""
    (folder / "demo").symlink_to(ROOT / "demo")
    with contextlib.chdir(folder):
        for _, *arguments in by_program("vllm-medusa"):
            if arguments[0] in names:
                done = run_tool(*arguments, *QUICKER.get(arguments[0], []))
                assert done.returncode == 0, done.stderr
    return {path.name for path in folder.iterdir()} - {"demo"}


def test_tools_on_the_demo(tmp_path: Path) -> None:
    written = run_tools(TOOLS_ON_THE_DEMO, tmp_path)
    assert written == {"converted-heads", "results", "trees.svg"}


def test_all_tools_are_run() -> None:
    assert {command[1] for command in by_program("vllm-medusa")} == TOOLS_ON_THE_DEMO | NEW_HEADS


def test_serving(tmp_path: Path) -> None:
    """As in the README, but for the port."""
    (command,) = by_program("vllm")
    (request,) = by_program("curl")
    url = f"http://127.0.0.1:{free_port()}"
    log = tmp_path / "server.log"
    here = ["--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *here],
            cwd=ROOT,
            env=environment(PATH=ENVIRONMENT["PATH"]),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_ready(Server(url, log, process))
        request = [part.replace("http://localhost:8000", url) for part in request]
        answer = subprocess.run(
            [*request, "--silent", "--fail"], capture_output=True, text=True, check=True
        )
        assert json.loads(answer.stdout)["usage"]["completion_tokens"] == 32
    finally:
        process.terminate()
        process.wait(60)
