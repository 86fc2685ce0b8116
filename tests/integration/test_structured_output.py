"""Grammars: the same text as without speculation, from trees whose nodes each follow their path."""

from __future__ import annotations

import json
import random
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.structured_output.request import get_structured_output_key

from tests import tiny
from tests.integration.command_line import engine_config
from tests.integration.conftest import (
    counters,
    draft_with,
    make_oracle,
    open_engine,
    spec_metrics,
    token_ids,
)
from vllm_medusa.plugin.core.structured_output import fill_tree, stop_at_the_end
from vllm_medusa.tree.named import named_tree

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
    spec = medusa_with(max_tree_requests=10, **tree)
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


# Grammars that end long before the request does, which then goes on without one.
SHORT: list[dict[str, Any]] = [
    {"choice": ["return self", "return None", "pass"]},
    {"regex": r"(def|class) [a-z_]{3,8}\((self|cls)?\):"},
    {"regex": r"[a-z]{2,20}"},
    {"json": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}},
]
PROMPTS = [{"prompt_token_ids": [100 + index, 200, 300, 400 + index]} for index in range(8)]


def medusa_with(**keys: Any) -> dict[str, Any]:
    return {"method": "medusa", "model": str(DEMO / "heads"), **keys}


def past_the_end(min_tokens: int) -> list[SamplingParams]:
    return [
        SamplingParams(
            temperature=temperature,
            seed=3,
            max_tokens=40,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            structured_outputs=StructuredOutputsParams(**constraint),
        )
        for temperature, ignore_eos in ((0, True), (0.8, False))
        for constraint in SHORT
    ]


def ends(outputs: list[Any]) -> list[tuple[list[int], str]]:
    return [(list(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in outputs]


def past_options(**config: str) -> dict[str, Any]:
    return {
        "skip_tokenizer_init": False,
        "structured_outputs_config": {"backend": "guidance", **config},
    }


@pytest.fixture(scope="module")
def without_speculation() -> list[list[tuple[list[int], str]]]:
    """What vLLM makes of `past_the_end` without speculation."""
    with open_engine(DEMO / "model", **past_options()) as llm:
        return [ends(llm.generate(PROMPTS, past_the_end(n), use_tqdm=False)) for n in (0, 20)]


@pytest.mark.parametrize(
    ("tree", "config"),
    [
        ("chain", {}),
        ("cpu-32", {}),
        # Such requests draft the first path only, which vLLM itself masks. Without a word in its
        # chat template, this parser finds nothing to reason about.
        ("cpu-32", {"reasoning_parser": "deepseek_v3"}),
    ],
    ids=["chain", "tree", "reasoning parser"],
)
def test_accepted_paths_past_the_end(
    tree: str, config: dict[str, str], without_speculation: Any
) -> None:
    """An accepted path runs through the grammar's end and on behind it."""
    paths = [(), *named_tree(tree, 4).paths]
    deepest = max(range(len(paths)), key=lambda node: (len(paths[node]), paths[node]))
    spec = medusa_with(tree=tree)
    with open_engine(DEMO / "model", speculative_config=spec, **past_options(**config)) as llm:
        for expected, min_tokens in zip(without_speculation, (0, 20), strict=True):
            oracle = make_oracle(PROMPTS, [tokens for tokens, _ in expected])
            draft_with(llm, partial(tiny.OracleDrafter, oracle))
            oracle.fixed_node = None if config else deepest
            before = spec_metrics(llm)["num_accepted_tokens"]
            found = ends(llm.generate(PROMPTS, past_the_end(min_tokens), use_tqdm=False))
            assert found == expected
            assert sum(oracle.chosen.values()) > 25
            assert spec_metrics(llm)["num_accepted_tokens"] - before > 25


BACKENDS = {
    "xgrammar": ("backend_xgrammar", "XgrammarBackend"),
    "guidance": ("backend_guidance", "GuidanceBackend"),
    "outlines": ("backend_outlines", "OutlinesBackend"),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_walks_of_vllms_grammars(name: str) -> None:
    """Random trees over vLLM's grammars, each node against a grammar fed with its path alone."""
    module, kind = BACKENDS[name]
    config = engine_config(DEMO / "model", medusa_with(tree="cpu-32"))
    tokenizer = cached_tokenizer_from_config(config.model_config)
    vocab_size = config.model_config.get_vocab_size()
    backend = getattr(import_module(f"vllm.v1.structured_output.{module}"), kind)(
        config, tokenizer=tokenizer, vocab_size=vocab_size
    )
    end = tokenizer.eos_token_id
    rng = random.Random(5)
    num_ends = 0
    for constraint in SHORT * 3:
        if name == "xgrammar" and "choice" in constraint:
            continue  # vLLM hands xgrammar a grammar instead
        key = get_structured_output_key(StructuredOutputsParams(**constraint))

        def fresh(context: list[int], key: Any = key) -> Any:
            grammar = backend.compile_grammar(*key, stop_token_ids={end})
            stop_at_the_end(grammar)
            assert grammar.accept_tokens("r", context)
            return grammar

        context = walk(backend, fresh, [], rng.randrange(4), rng)
        parents, paths = [], [context]
        for node in range(12):
            parents.append(rng.randrange(node + 1))
            paths.append(walk(backend, fresh, paths[parents[-1]], 1, rng))
        tokens = [path[-1] for path in paths[1:]]
        num_ends += tokens.count(end)
        bitmask = backend.allocate_token_bitmask(len(paths))
        grammar = fresh(context)
        fill_tree(bitmask, grammar, "r", tokens, parents)
        for node, path in enumerate(paths):
            assert torch.equal(bitmask[node], mask(backend, fresh(path))), (constraint, node)
        assert torch.equal(mask(backend, grammar), bitmask[0])
    assert num_ends > 3


def walk(backend: Any, fresh: Any, context: list[int], count: int, rng: Any) -> list[int]:
    """A context and tokens behind it that its grammar permits."""
    for _ in range(count):
        allowed = mask(backend, fresh(context))
        bits = (allowed[:, None] >> torch.arange(32)) & 1
        permitted = bits.flatten().nonzero().flatten().tolist()
        context = [*context, rng.choice(permitted)]
    return context


def mask(backend: Any, grammar: Any) -> torch.Tensor:
    """The mask of a grammar's next token."""
    bitmask = backend.allocate_token_bitmask(1)
    if grammar.is_terminated():
        return torch.full_like(bitmask[0], -1)
    grammar.fill_bitmask(bitmask, 0)
    return bitmask[0]
