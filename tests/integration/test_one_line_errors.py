"""What the user sees of a mistake: one line, on the standard error."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.integration.command_line import (
    DEMO_MODEL,
    MEDUSA_HEADS,
    run_python,
    run_vllm,
    serve_arguments,
)
from tests.integration.test_bad_input import medusa
from vllm_medusa.errors import UserError
from vllm_medusa.plugin.one_line_errors import (
    exit_in_one_line,
    handed_over,
    wrap_wait_for_engine_startup,
)

pytestmark = pytest.mark.engine


def check_one_line(result: Any, expected: str) -> None:
    """One line of ours, on the standard error, and nothing else that names our code."""
    assert result.returncode == 1
    ours = [line for line in result.stderr.splitlines() if "vllm_medusa" in line]
    assert len(ours) == 1, result.stderr
    assert "vllm_medusa: error: " in ours[0]
    assert expected in ours[0]
    assert "vllm_medusa/" not in result.stdout


def test_serve_prints_one_line(tiny_heads: Path) -> None:
    spec = json.dumps(medusa(tiny_heads))
    result = run_vllm("serve", str(DEMO_MODEL), "--speculative-config", spec)
    check_one_line(result, "for hidden size 128, the target model has 256")
    assert "Traceback" not in result.stdout + result.stderr


def test_script_prints_one_line() -> None:
    spec = medusa(MEDUSA_HEADS, tree=[[0], [1, 0]])
    result = run_python(f"import vllm; vllm.LLM({str(DEMO_MODEL)!r}, speculative_config={spec!r})")
    check_one_line(result, "tree path [1, 0] has no parent; add the path [1]")
    assert "Traceback" not in result.stdout + result.stderr


@pytest.fixture
def in_engine_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give this process the name of an engine core's; return the file that its front end reads."""
    monkeypatch.setattr(multiprocessing.current_process(), "_name", "EngineCore_DP0")
    path = tmp_path / "error"
    path.touch()
    monkeypatch.setenv("MEDUSA_ERROR_FILE", str(path))
    return path


def test_mistakes_in_an_engine_process(
    in_engine_process: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="vLLM's"), exit_in_one_line():
        raise ValueError("vLLM's own")
    with pytest.raises(SystemExit) as caught, exit_in_one_line():
        raise UserError("too small; give more")
    assert caught.value.code == 1
    assert in_engine_process.read_text() == "too small; give more"
    # What vLLM says of it in its own words.
    with pytest.raises(SystemExit), exit_in_one_line():
        raise RuntimeError("a worker has failed")
    with pytest.raises(UserError), handed_over():
        raise UserError("another")
    assert in_engine_process.read_text() == "another"
    assert capfd.readouterr().err == ""
    in_engine_process.unlink()
    with pytest.raises(SystemExit), exit_in_one_line():
        raise UserError("nobody reads; look here")
    assert in_engine_process.read_text() == "nobody reads; look here"


def test_mistakes_that_no_front_end_waits_for(
    in_engine_process: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MEDUSA_ERROR_FILE")
    with pytest.raises(SystemExit), exit_in_one_line():
        raise UserError("too small; give more")
    assert capfd.readouterr().err == "vllm_medusa: error: too small; give more\n"


def test_mistakes_elsewhere_are_left_alone() -> None:
    with pytest.raises(UserError), exit_in_one_line():
        raise UserError("too small; give more")


def test_the_front_end_raises_what_the_engine_has_said(in_engine_process: Path) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("Engine core initialization failed.")

    wait = wrap_wait_for_engine_startup(fail)
    with pytest.raises(RuntimeError, match="initialization failed"):
        wait()
    in_engine_process.write_text("too small; give more")
    with pytest.raises(UserError, match=r"^too small; give more$"):
        wait()
    with pytest.raises(RuntimeError, match="initialization failed"):
        wait()


SMALL_CACHE = {"max_model_len": 512, "num_gpu_blocks_override": 17, "block_size": 32}
NO_ROOM = "the KV cache of 17 blocks has no room for the"


def check_last_line(result: Any, expected: str) -> None:
    check_one_line(result, expected)
    last = [line for line in result.stderr.splitlines() if line.strip()][-1]
    assert "vllm_medusa: error: " in last, result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.slow
def test_engine_process_prints_one_line() -> None:
    """A mistake that shows only when the memory is known, in the engine core's process."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL_CACHE.items()]
    spec = json.dumps(medusa(MEDUSA_HEADS, tree="cpu-16"))
    argv = ["--speculative-config", spec, "--dtype=float32", "--enforce-eager"]
    result = run_vllm("serve", str(DEMO_MODEL), *argv, *options)
    check_last_line(result, NO_ROOM)


SCRIPT = """
import sys
from vllm import LLM

if __name__ == "__main__":
    LLM({model!r}, speculative_config={spec!r}, dtype="float32", enforce_eager=True, **{options!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_script_says_what_its_engine_found(ranks: int, tmp_path: Path) -> None:
    """Heads that are not finite, which the workers find."""
    heads = tmp_path / "heads"
    shutil.copytree(MEDUSA_HEADS, heads)
    weights = next(heads.glob("*.safetensors"))
    tensors = load_file(weights)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[3] = math.nan
    save_file(tensors, weights)
    options = {"max_model_len": 512, "tensor_parallel_size": ranks}
    source = SCRIPT.format(model=str(DEMO_MODEL), spec=medusa(heads), options=options)
    check_last_line(run_python(source), "holds NaN")


def test_parser_refuses_other_words() -> None:
    with pytest.raises(SystemExit):
        serve_arguments(DEMO_MODEL, "--spec-method", "medusa2")
