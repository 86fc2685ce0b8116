"""What the sub-commands share on the command line."""

from __future__ import annotations

import pytest

from vllm_medusa.cli import main as cli


@pytest.mark.parametrize(
    "command",
    [
        "distill --model m --prompts p.jsonl --out o",
        "calibrate heads --model m --prompts p.jsonl",
        "bench --model m",
        "trees --model m --prompt p",
    ],
)
@pytest.mark.parametrize(("text", "fault"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_malformed_options_of_vllm_are_named(
    capsys: pytest.CaptureFixture[str], command: str, text: str, fault: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--llm-options", text])
    assert ended.value.code == 2
    assert f"argument --llm-options: '{text}' {fault}" in capsys.readouterr().err
