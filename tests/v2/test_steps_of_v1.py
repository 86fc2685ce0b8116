"""The same heads and tree accept the same on both runners, step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import open_engine

DEMO = Path(__file__).resolve().parents[2] / "demo"
NUM_PROMPTS, MAX_TOKENS = 3, 40
TREE = "cpu-16"


def tokens_of_steps() -> list[list[list[int]]]:
    """Tokens that each step gave, of demo prompts one after the other."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    params = SamplingParams(
        temperature=0,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )
    spec = {"method": "medusa", "model": str(DEMO / "medusa-heads"), "tree": TREE}
    texts = []
    options: dict[str, Any] = {"skip_tokenizer_init": False, "speculative_config": spec}
    with open_engine(DEMO / "model", **options) as llm:
        for number, line in enumerate(lines[:NUM_PROMPTS]):
            engine, steps = llm.llm_engine, []
            engine.add_request(str(number), json.loads(line)["prompt"], params)
            while engine.has_unfinished_requests():
                steps += [list(output.outputs[0].token_ids) for output in engine.step()]
            texts.append([tokens for tokens in steps if tokens])
    return texts


@pytest.mark.slow
@pytest.mark.usefixtures("fast_attention")
def test_acceptance_is_that_of_v1(tmp_path: Path) -> None:
    found = tokens_of_steps()
    out = tmp_path / "steps.json"
    subprocess.run(
        [sys.executable, "-m", "tests.v2.test_steps_of_v1", str(out)],
        env={**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "0"},
        cwd=DEMO.parent,
        check=True,
    )
    assert found == json.loads(out.read_text())
    accepted = [len(step) - 1 for steps in found for step in steps[1:]]
    assert max(accepted) > 2
    assert sum(accepted) > NUM_PROMPTS * MAX_TOKENS / 4


if __name__ == "__main__":
    import tests.conftest  # noqa: F401

    Path(sys.argv[1]).write_text(json.dumps(tokens_of_steps()))
