"""Grammars: the same text as without speculation, from trees whose nodes each follow their path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.integration.conftest import counters, open_engine, spec_metrics, token_ids

pytestmark = pytest.mark.engine

DEMO = Path(__file__).resolve().parents[2] / "demo"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "value": {"type": "integer"},
        "kind": {"enum": ["function", "class", "module"]},
    },
    "required": ["name", "value", "kind"],
    "additionalProperties": False,
}
GRAMMAR = """
root ::= "return " expression "\\n"
expression ::= term | term " + " expression
term ::= "self." [a-z]+ | [0-9]+ | "(" expression ")"
"""


def params() -> list[SamplingParams]:
    constraints: list[dict[str, Any]] = [
        {"json": SCHEMA},
        {"regex": r"(def|class) [a-z_]{3,12}\((self|cls)(, [a-z]{2,6}){0,3}\):"},
        {"grammar": GRAMMAR},
        {"choice": ["return self._get_value", "return self._get_name", "return None"]},
    ]
    structured = [
        SamplingParams(
            temperature=temperature,
            seed=1,
            max_tokens=48,
            structured_outputs=StructuredOutputsParams(**constraint),
        )
        for temperature in (0, 0.8)
        for constraint in constraints
    ]
    # Beside them in the batch: one without a grammar, and one whose stop tokens are held back.
    free = SamplingParams(temperature=0, max_tokens=48)
    held_back = structured[0].clone()
    held_back.min_tokens = 20
    return [*structured, free, held_back]


@pytest.mark.parametrize(
    ("backend", "tree"),
    [
        ("xgrammar", {"tree": "cpu-32"}),
        # Nodes that are not in depth-first order.
        ("guidance", {"num_speculative_tokens_per_batch_size": [[1, 4, 32], [5, 20, 24]]}),
    ],
)
def test_grammars(backend: str, tree: dict[str, Any]) -> None:
    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[: len(params())]]
    options = {
        "skip_tokenizer_init": False,
        "max_model_len": 1024,
        "structured_outputs_config": {"backend": backend},
    }
    with open_engine(DEMO / "model", **options) as llm:
        reference = llm.generate(prompts, params(), use_tqdm=False)
    spec = {
        "method": "medusa",
        "model": str(DEMO / "heads"),
        "max_tree_requests": 10,
        **tree,
    }
    with open_engine(DEMO / "model", speculative_config=spec, **options) as llm:
        outputs = llm.generate(prompts, params(), use_tqdm=False)
        metrics = spec_metrics(llm)
        assert counters(llm)["forks_accepted"] > 5
    for expected, output in zip(reference, outputs, strict=True):
        assert output.outputs[0].text == expected.outputs[0].text
    assert token_ids(outputs) == token_ids(reference)
    # Trees, not chains: more drafts than a first path has.
    assert metrics["num_draft_tokens"] > 20 * metrics["num_drafts"]
    assert metrics["num_accepted_tokens"] > 0.2 * metrics["num_drafts"]
