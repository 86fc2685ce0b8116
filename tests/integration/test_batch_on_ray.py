"""`examples/batch_on_ray.py`: the answers of `LLM.generate`, each row once, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset
import pyarrow.parquet
import pytest

from tests.integration.command_line import DEMO_HEADS, DEMO_MODEL, REPO
from tests.integration.conftest import greedy, open_engine

pytestmark = pytest.mark.engine

NUM_PROMPTS = 16
MAX_TOKENS = 48
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 2}
TREE = {"method": "medusa", "model": str(DEMO_HEADS), "tree": "cpu-8"}
#: Ray runs what it starts at a low priority, on a machine with other work for minutes.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(REPO),
    "RAY_worker_niceness": "0",
    "VLLM_HOST_IP": "127.0.0.1",
}
ENGINE_ACTOR = "ray::MapWorker(MapBatches(vLLMEngine"


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, str]]:
    lines = (DEMO_MODEL.parent / "prompts.jsonl").read_text().splitlines()[:NUM_PROMPTS]
    return [{"name": f"text {i}", **json.loads(line)} for i, line in enumerate(lines)]


@pytest.fixture(scope="module")
def expected(prompts: list[dict[str, str]]) -> list[list[int]]:
    """What `LLM.generate` makes of them, without speculation and without Ray."""
    with open_engine(DEMO_MODEL, skip_tokenizer_init=False) as llm:
        return greedy(llm, [row["prompt"] for row in prompts], MAX_TOKENS)


def command(prompts: Path, out: Path, *extra: str) -> list[str]:
    line = f"examples/batch_on_ray.py --model {DEMO_MODEL} --prompts {prompts} --out {out}"
    sampling = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    settings = ["--sampling", json.dumps(sampling), "--rows-per-file", "2"]
    engine = json.dumps({**ENGINE, "speculative_config": TREE})
    return [sys.executable, *line.split(), *settings, "--engine-kwargs", engine, *extra]


class FamilyOf:
    """A process and all that it starts, which may outlive it."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._seen: set[psutil.Process] = {self._root}

    def look(self) -> list[psutil.Process]:
        for process in list(self._seen):
            if process.is_running():
                self._seen.update(process.children(recursive=True))
        return [process for process in self._seen if process.is_running()]

    def kill(self) -> None:
        for process in self.look():
            process.kill()


@contextmanager
def started(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], FamilyOf]]:
    """A run of which nothing is left at the end."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, cwd=REPO, env=ENVIRONMENT, text=True, **pipes) as process:
        family = FamilyOf(process.pid)
        try:
            yield process, family
        finally:
            family.kill()


def finish(arguments: list[str]) -> str:
    with started(arguments) as (process, _):
        said, progress = process.communicate()
    assert process.returncode == 0, progress[-3000:]
    return said


def wait_for_rows(process: subprocess.Popen[str], out: Path, family: FamilyOf) -> None:
    """Until some are finished, and not all."""
    while not finished_files(out) and process.poll() is None:
        time.sleep(0.1)
    family.look()
    assert process.poll() is None, process.communicate()[1][-3000:]
    assert len(finished_files(out)) < NUM_PROMPTS / 2


def finished_files(out: Path) -> set[str]:
    """What the names of files of finished rows begin with."""
    notes = (out / "finished").glob("*.parquet")
    return {note.stem for note in notes if not note.stem.endswith(".pending")}


def check(
    out: Path, format_: str, prompts: list[dict[str, str]], expected: list[list[int]]
) -> dict[str, bytes]:
    """Each row once, its own columns kept, with the answer that it gets without Ray."""
    rows = pyarrow.dataset.dataset(out / "rows", format=format_).to_table().to_pylist()
    assert sorted(row["name"] for row in rows) == sorted(row["name"] for row in prompts)
    found = {row["name"]: row for row in rows}
    assert [found[row["name"]]["answer_token_ids"] for row in prompts] == expected
    assert [found[row["name"]]["prompt"] for row in prompts] == [row["prompt"] for row in prompts]
    return {path.name: path.read_bytes() for path in (out / "rows").iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_engine_loses_no_row(
    tmp_path: Path, prompts: list[dict[str, str]], expected: list[list[int]]
) -> None:
    given, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    given.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    arguments = command(given, out, "--engines", "2")
    with started(arguments) as (process, family):
        wait_for_rows(process, out, family)
        engines = [p for p in family.look() if "".join(p.cmdline()).startswith(ENGINE_ACTOR)]
        assert len(engines) == 2
        engines[0].kill()
        said, progress = process.communicate()
    assert process.returncode == 0, progress[-3000:]
    assert f"{NUM_PROMPTS} rows, {NUM_PROMPTS * MAX_TOKENS} tokens" in said
    files = check(out, "json", prompts, expected)
    # Nothing is left to do, so nothing is started, and nothing changes.
    begin = time.monotonic()
    assert f"{NUM_PROMPTS} rows" in finish(arguments)
    assert time.monotonic() - begin < 15
    assert check(out, "json", prompts, expected) == files


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_run_goes_on(
    tmp_path: Path, prompts: list[dict[str, str]], expected: list[list[int]]
) -> None:
    given, out = tmp_path / "prompts.parquet", tmp_path / "out"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(prompts), given)
    arguments = command(given, out, "--format", "parquet")
    with started(arguments) as (process, family):
        wait_for_rows(process, out, family)
        process.send_signal(signal.SIGKILL)
    finished = tuple(finished_files(out))
    kept = {p.name: p.read_bytes() for p in (out / "rows").iterdir() if p.name.startswith(finished)}
    assert kept
    finish(arguments)
    files = check(out, "parquet", prompts, expected)
    assert {name: files[name] for name in kept} == kept


def refused(arguments: list[str]) -> str:
    """The one line of a run that does not begin."""
    done = subprocess.run(arguments, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("batch_on_ray: error: ")
    return line


@pytest.mark.parametrize(
    ("given", "extra", "message"),
    [
        ('{"text": "a"}\n', [], "no column 'prompt', only ['text']"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', [], "the same id twice"),
        ('{"prompt": "a"}\n', ["--ray", "127.0.0.1:1"], "no Ray cluster found there"),
        ('{"prompt": ', [], "cannot be read (Error creating dataset"),
        (None, [], "no such file"),
    ],
)
def test_mistake_is_one_line(
    tmp_path: Path, given: str | None, extra: list[str], message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    if given is not None:
        path.write_text(given)
    arguments = command(path, tmp_path / "out", *extra)
    assert message in refused(arguments)


def test_another_batch_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    path.write_text('{"text": "a"}\n')
    refused(command(path, out))
    assert "was begun with model=" in refused(command(path, out, "--model", "another"))
    path.write_text('{"text": "b"}\n')
    assert "was begun with prompts_sha256=" in refused(command(path, out))
