"""The supervisor of processes and the protocol of engines, with processes that have no vLLM."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_medusa.engines import engine, process, worker
from vllm_medusa.engines.engine import EngineProcess, start_engine
from vllm_medusa.engines.process import EngineProcessError, Process
from vllm_medusa.errors import UserError


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_WORKER", "tests.fake_engine")


def run_shell(script: str, **environment: str) -> Process:
    return Process(["sh", "-c", script], environment)


def test_failure_tells_the_log_and_the_ending() -> None:
    with run_shell("echo $WORDS >&2; exit 3", WORDS="ValueError: no tokens") as ended:
        assert ended.end() == 3
        failure = ended.failure()
    assert (failure.reason, failure.ending) == ("ValueError: no tokens", "ended with status 3")
    assert "its log ends:\nValueError: no tokens" in str(failure)
    with run_shell("kill -9 $$") as killed:
        killed.end()
        assert killed.failure().ending == "was killed by signal 9"


def test_log_of_a_live_process() -> None:
    with run_shell("echo first; exec sleep 1000") as alive:
        while "first" not in str(alive.failure()):
            time.sleep(0.01)
        assert alive.failure().ending == "does not answer"


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_all_that_was_started_ends(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    """Also a grandchild that ignores being asked; at once if there was an exception."""
    patience = 0.3 if error is None else 1000.0
    monkeypatch.setattr(process, "_PATIENCE_S", patience)
    begin = time.monotonic()
    try:
        with run_shell("trap '' TERM; sleep 1000 & sleep 1000; sleep 1000") as started:
            while not (below := psutil.Process(started.pid).children()):
                time.sleep(0.01)
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive
    assert time.monotonic() - begin < 10


def test_engine_that_runs() -> None:
    told: list[tuple[int, int]] = []
    with start_engine({"model": "answers"}) as started:
        run = started.run([[1, 2], [3]], 4, report=lambda *counts: told.append(counts))
        assert started.reset_prefix_cache()
    assert run.token_ids == [[2, 10], [1, 10]]
    assert told == [(2, 7)]


def test_time_to_start() -> None:
    with EngineProcess({"model": "starts slowly"}) as started:
        assert started.wait().startup_s > 0.2


def test_engine_that_refuses_says_why_itself() -> None:
    with pytest.raises(UserError, match=r"does not start with .*: no such dtype; correct"):
        start_engine({"model": "refuses"})
    with EngineProcess({"model": "gives up"}) as started:
        started.wait()
        with pytest.raises(EngineProcessError, match="cache too small") as failed:
            started.run([[1]], 4)
        assert (failed.value.reason, failed.value.ending) == ("cache too small", None)
        with pytest.raises(EngineProcessError):
            started.run([[1]], 4)


def test_engine_that_crashes_is_told_by_its_log() -> None:
    with EngineProcess({"model": "crashes"}) as started:
        started.wait()
        with pytest.raises(EngineProcessError, match="was killed by signal 9") as failed:
            started.run([[1]], 4)
    assert failed.value.reason == "Fatal: out of luck"


def told_by(started: EngineProcess) -> list[Any]:
    """The engine's variable WORD, its folder, its parent's id, and how often it was prepared."""
    told: list[Any] = json.loads(started.wait().device_name or "")
    return told


def test_engines_with_equal_environments_share_a_starter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each gets the variables and the folder that its caller has when it starts."""
    options = {"model": "answers"}
    with EngineProcess(options, {"WORD": "a"}) as first, EngineProcess(options) as other:
        word, folder, starter, num_prepared = told_by(first)
        assert (word, folder, num_prepared) == ("a", os.getcwd(), 1)
        word, _, other_starter, num_prepared = told_by(other)
        assert (word, num_prepared) == (None, 1)
        assert other_starter != starter
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WORD", "b")
        with EngineProcess(options) as third:
            assert told_by(third) == ["b", str(tmp_path), other_starter, 1]
        # They end one by one.
        assert first.reset_prefix_cache()
        assert other.reset_prefix_cache()


def test_engines_are_prepared_one_by_one_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "has_accelerator", lambda: True)
    with EngineProcess({"model": "answers"}) as started:
        assert told_by(started)[-1] == 0


def test_starter_that_was_killed_is_replaced() -> None:
    """Its engines go on, and each one's end is noticed."""
    options = {"model": "answers"}
    with EngineProcess(options) as started, EngineProcess(options) as other:
        psutil.Process(told_by(started)[2]).kill()
        assert started.run([[1]], 4).token_ids == [[1, 10]]
        os.kill(started.pid, signal.SIGKILL)
        with pytest.raises(EngineProcessError, match="was killed by signal 9"):
            started.run([[1]], 4)
        told_by(other)
        assert other.run([[1]], 4).token_ids == [[1, 10]]
    with pytest.raises(EngineProcessError, match="was killed by signal 9"):
        EngineProcess(options)
    with EngineProcess(options) as started:
        started.wait()
        assert started.run([[1]], 4).token_ids == [[1, 10]]


def test_starter_and_engines_end_with_their_caller() -> None:
    program = (
        "import os, signal\n"
        "from vllm_medusa.engines import engine\n"
        "engine._WORKER = 'tests.fake_engine'\n"
        "started = engine.EngineProcess({'model': 'answers'})\n"
        "print(started.pid, started.wait().device_name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    pid, _, told = done.stdout.partition(" ")
    deadline = time.monotonic() + 20
    while any(map(psutil.pid_exists, (int(pid), json.loads(told)[2]))):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_reason_of_an_exception() -> None:
    from pydantic import BaseModel

    class Strict(BaseModel):
        number: int

    with pytest.raises(ValueError) as caught:
        Strict(number="x")  # type: ignore[arg-type]
    assert worker.reason_of(caught.value).startswith("Input should be a valid integer")
    assert worker.reason_of(ValueError("two\n lines")) == "two lines"
    assert worker.reason_of(KeyError("name")) == "KeyError: 'name'"
    assert worker.reason_of(RuntimeError()) == "RuntimeError: "


def test_worker_replies_with_the_error_and_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real worker's protocol, where making the engine fails."""
    sent: list[str] = []

    def refuse(options: dict[str, Any]) -> Any:
        raise ValueError(f"no {options['model']}")

    class Replies(io.StringIO):
        def write(self, text: str) -> int:
            sent.append(text)
            return len(text)

    monkeypatch.setattr(worker, "_make_engine", refuse)
    monkeypatch.setattr(worker.os, "fdopen", lambda *_, **__: Replies())
    monkeypatch.setattr(worker, "_read_ahead", lambda _: iter([START]))
    worker.main(0)
    assert sent == ['{"error": "no such model"}\n']
    assert "ValueError: no such model" in capfd.readouterr().err


START = {"options": {"model": "such model"}, "watch": None}


def test_worker_does_not_outlive_its_caller() -> None:
    """A run that takes longer than the caller lives is not finished."""
    program = (
        "import sys, time\n"
        "from vllm_medusa.engines import worker\n"
        "worker._SECONDS_TO_END = 0.2\n"
        "next(worker._read_ahead(sys.stdin))\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as started:
        assert started.stdin is not None
        started.stdin.write(b"{}\n")
        started.stdin.close()
        assert started.wait(20) == 1
