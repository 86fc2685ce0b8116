"""What the user sees of a mistake: one line, on the standard error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command_line import (
    DEMO_HEADS,
    DEMO_MODEL,
    run_python,
    run_vllm,
    serve_arguments,
)
from tests.integration.test_bad_input import medusa
from vllm_medusa.errors import UserError
from vllm_medusa.plugin.one_line_errors import exit_in_one_line

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
    spec = medusa(DEMO_HEADS, tree=[[0], [1, 0]])
    result = run_python(f"import vllm; vllm.LLM({str(DEMO_MODEL)!r}, speculative_config={spec!r})")
    check_one_line(result, "tree path [1, 0] has no parent; add the path [1]")
    assert "Traceback" not in result.stdout + result.stderr


def test_mistakes_in_an_engine_process(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_in_one_line(is_own_process=True):
        raise UserError("too small; give more")
    assert caught.value.code == 1
    assert capfd.readouterr().err == "vllm_medusa: error: too small; give more\n"
    with pytest.raises(UserError), exit_in_one_line(is_own_process=False):
        raise UserError("too small; give more")
    with pytest.raises(ValueError, match="vLLM's"), exit_in_one_line(is_own_process=True):
        raise ValueError("vLLM's own")


@pytest.mark.slow
def test_engine_process_prints_one_line() -> None:
    """A mistake that shows only when the memory is known, in the engine core's process."""
    argv = ["--dtype", "float32", "--max-model-len", "512", "--num-gpu-blocks-override", "17"]
    argv += ["--block-size", "32", "--enforce-eager"]
    spec = json.dumps(medusa(DEMO_HEADS, tree="cpu-16"))
    result = run_vllm("serve", str(DEMO_MODEL), "--speculative-config", spec, *argv)
    check_one_line(result, "the KV cache of 17 blocks has no room for the")


def test_parser_refuses_other_words() -> None:
    with pytest.raises(SystemExit):
        serve_arguments(DEMO_MODEL, "--spec-method", "medusa2")
