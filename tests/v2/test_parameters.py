"""Every sampling parameter gives the text of no speculation, seeded requests too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.integration.conftest import spec_metrics, token_ids
from tests.v2.oracle import Oracle, oracle
from tests.v2.trees import NUM_HEADS, spec
from vllm_medusa.tree.named import default_paths

SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 11}
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": SEEDED,
    "top_k_top_p": {**SEEDED, "top_k": 20, "top_p": 0.9},
    "min_p": {**SEEDED, "min_p": 0.1},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    "penalties_seeded": {**SEEDED, "frequency_penalty": 1.2, "repetition_penalty": 1.3},
    "bad_words": {"bad_words": [[5], [9, 3]]},
    "allowed": {"allowed_token_ids": list(range(40, 90))},
    "logit_bias": {"logit_bias": {5: 8.0, 17: 6.0, 250: -100.0}},
    "min_tokens": {"min_tokens": 12, "stop_token_ids": list(range(90)), "ignore_eos": False},
    "stop_token": {"stop_token_ids": list(range(12)), "ignore_eos": False},
    "logprobs": {"logprobs": 3},
    "logprobs_seeded": {**SEEDED, "logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 0},
}
# Requests of several kinds beside one another.
MIXED = ["penalties", "seeded", "bad_words", "logprobs"]
NUM_TOKENS = 14
NUM_NODES = 12
DEPTH = max(map(len, default_paths(NUM_HEADS, NUM_NODES)))

pytestmark = pytest.mark.usefixtures("fast_attention")


def sampling(name: str, reference: list[list[int]]) -> SamplingParams:
    values = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, **PARAMETERS[name]}
    bad_words = values.pop("bad_words", None)
    params = SamplingParams(detokenize=False, **values)
    if bad_words is not None:
        # Words that the text would have: of one, two and three tokens.
        params._bad_words_token_ids = [
            *bad_words,
            *([text[4]] for text in reference[:2]),
            *(text[6:8] for text in reference),
            *(text[9:12] for text in reference),
        ]
    return params


def generate(llm: Any, prompts: list[Any], names: list[str], reference: list[list[int]]) -> Any:
    params = [sampling(name, reference) for name in names]
    return llm.generate(prompts[: len(names)], params, use_tqdm=False)


def names_of(case: str) -> list[str]:
    return MIXED if case == "mixed" else [case, case]


@pytest.fixture(scope="module")
def expected(
    engine: Callable[..., Any], prompts: list[Any], reference: list[list[int]]
) -> dict[str, Any]:
    with engine() as llm:
        return {
            case: generate(llm, prompts, names_of(case), reference)
            for case in [*PARAMETERS, "mixed"]
        }


@pytest.fixture(scope="module")
def trees(
    engine: Callable[..., Any], tiny_heads: Path, expected: Any, fast_attention: None
) -> Iterator[tuple[Any, Oracle]]:
    with oracle() as drafts, engine(speculative_config=spec(tiny_heads, NUM_NODES)) as llm:
        yield llm, drafts


@pytest.mark.parametrize("case", [*PARAMETERS, "mixed"])
def test_parameter(
    case: str,
    trees: tuple[Any, Oracle],
    expected: dict[str, Any],
    prompts: list[Any],
    reference: list[list[int]],
) -> None:
    llm, drafts = trees
    wanted = expected[case]
    drafts.expect(prompts[: len(wanted)], token_ids(wanted))
    before = spec_metrics(llm)["num_accepted_tokens"]
    found = generate(llm, prompts, names_of(case), reference)
    assert token_ids(found) == token_ids(wanted)
    assert spec_metrics(llm)["num_accepted_tokens"] - before > sum(map(len, token_ids(wanted))) / 4
    for a, b in zip(wanted, found, strict=True):
        check_logprobs(a.outputs[0].logprobs, b.outputs[0].logprobs)
        check_logprobs((a.prompt_logprobs or [])[1:], (b.prompt_logprobs or [])[1:])


def check_logprobs(wanted: Any, found: Any) -> None:
    assert (wanted is None) == (found is None)
    for a, b in zip(wanted or (), found or (), strict=True):
        assert a.keys() == b.keys()
        assert all(abs(a[token].logprob - b[token].logprob) < 1e-4 for token in a)


@pytest.mark.parametrize("case", ["penalties", "bad_words"])
def test_our_kernels_are_in_use(
    case: str,
    trees: tuple[Any, Oracle],
    prompts: list[Any],
    reference: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's own would mostly give the same text: wrong ancestors seldom change the best token."""
    from vllm_medusa.plugin.worker.v2 import constraints

    calls: list[Any] = []
    monkeypatch.setattr(constraints, f"apply_{case}", lambda *args: calls.append(args))
    generate(trees[0], prompts, [case, case], reference)
    assert calls


def test_typical_acceptance(
    trees: tuple[Any, Oracle],
    expected: dict[str, Any],
    prompts: list[Any],
    reference: list[list[int]],
) -> None:
    """Who takes any token accepts to the depth of the tree; the others' text stays what it is."""
    llm, drafts = trees
    drafts.expect([], [])  # all drafts are wrong
    params = [sampling("seeded", reference) for _ in range(2)]
    options = {"acceptance": "typical", "posterior_threshold": 1e-12}
    params[1].extra_args = {"medusa": options}
    before = spec_metrics(llm)
    found = token_ids(llm.generate(prompts[:2], params, use_tqdm=False))
    after = spec_metrics(llm)
    assert found[0] == token_ids(expected["seeded"])[0]
    # The first token comes with the prompt; of each step's the last is a sample.
    steps = -(-(NUM_TOKENS - 1) // (DEPTH + 1))
    accepted = after["num_accepted_tokens"] - before["num_accepted_tokens"]
    luck = 3  # drafts that are right by chance
    assert DEPTH * (steps - 1) <= accepted <= DEPTH * steps + luck
    # Without the rule again, in the same place of the batch.
    del params[1].extra_args["medusa"]
    before = after
    found = token_ids(llm.generate(prompts[:2], params, use_tqdm=False))
    assert found == token_ids(expected["seeded"])
    assert spec_metrics(llm)["num_accepted_tokens"] <= before["num_accepted_tokens"] + luck


def test_verification_in_chunks(
    engine: Callable[..., Any],
    tiny_heads: Path,
    expected: dict[str, Any],
    prompts: list[Any],
    reference: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Float32 logits of a few requests at a time."""
    from vllm_medusa.plugin.worker.v2 import sampler

    monkeypatch.setattr(sampler, "get_max_chunk_logits", lambda _: 20)
    wanted = expected["logprobs_seeded"]
    with (
        oracle(prompts[:2], token_ids(wanted)),
        engine(speculative_config=spec(tiny_heads, NUM_NODES)) as llm,
    ):
        found = generate(llm, prompts, ["logprobs_seeded"] * 2, reference)
    assert token_ids(found) == token_ids(wanted)
    for a, b in zip(wanted, found, strict=True):
        check_logprobs(a.outputs[0].logprobs, b.outputs[0].logprobs)


def test_thinking_budget_is_refused(trees: tuple[Any, Oracle], prompts: list[Any]) -> None:
    params = SamplingParams(max_tokens=4, thinking_token_budget=2)
    with pytest.raises(VLLMValidationError, match="thinking_token_budget=2"):
        trees[0].generate(prompts[0], params, use_tqdm=False)
