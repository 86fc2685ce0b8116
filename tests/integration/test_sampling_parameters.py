"""Every sampling parameter, token for token the same with trees as without speculation.

Seeded requests are compared exactly too: the draw of each output position is the one that vLLM
makes without speculation (`plugin.worker.v1.noise`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from tests import tiny
from tests.integration.conftest import counters, random_prompts, spec_metrics, token_ids

pytestmark = pytest.mark.engine

SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 11}
PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": SEEDED,
    "top_k": {**SEEDED, "top_k": 5},
    "top_p": {**SEEDED, "top_p": 0.8},
    "top_k_top_p": {**SEEDED, "top_k": 20, "top_p": 0.9, "seed": 12},
    "min_p": {**SEEDED, "min_p": 0.1},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.2},
    "repetition": {"repetition_penalty": 1.7},
    "all_penalties": {
        **SEEDED,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "repetition_penalty": 1.2,
    },
    "allowed": {"allowed_token_ids": list(range(40, 90))},
    "logit_bias": {"logit_bias": {5: 8.0, 17: 6.0, 250: -100.0}},
    "min_tokens": {"min_tokens": 30, "stop_token_ids": list(range(60)), "ignore_eos": False},
    "stop_token": {"stop_token_ids": list(range(6)), "ignore_eos": False},
    "logprobs": {"logprobs": 3},
    "logprobs_seeded": {**SEEDED, "logprobs": 5},
    "prompt_logprobs": {"prompt_logprobs": 2, "logprobs": 0},
    "custom": {"extra_args": {"forbid_repeats_of_last": 3}},
    "custom_seeded": {**SEEDED, "extra_args": {"forbid_repeats_of_last": 5}},
}


class ForbidRecent(AdapterLogitsProcessor):
    """A user's logits processor that depends on the output so far."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        count = (params.extra_args or {}).get("forbid_repeats_of_last")
        if count is None:
            return None

        def process(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[output[-count:]] = float("-inf")
            return logits

        return process


def sampling(params: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        **{
            "temperature": 0,
            "max_tokens": 60,
            "ignore_eos": True,
            "detokenize": False,
            **params,
        }
    )


def bad_words(outputs: list[list[int]]) -> SamplingParams:
    """Forbid words that the greedy text holds, of one, two and three tokens."""
    params = sampling({})
    text = outputs[0]
    params._bad_words_token_ids = [text[3:4], text[8:10], text[15:18]]
    return params


def logprobs_of(output: Any) -> list[dict[int, float]]:
    places = (output.outputs[0].logprobs or []) + [p for p in output.prompt_logprobs or [] if p]
    return [{token: entry.logprob for token, entry in place.items()} for place in places]


def check_same(reference: list[Any], outputs: list[Any], names: list[str]) -> None:
    for name, expected, output in zip(names, reference, outputs, strict=True):
        assert token_ids([output]) == token_ids([expected]), name
        assert output.outputs[0].finish_reason == expected.outputs[0].finish_reason, name
        places, expected_places = logprobs_of(output), logprobs_of(expected)
        assert len(places) == len(expected_places), name
        for place, expected_place in zip(places, expected_places, strict=True):
            assert place == pytest.approx(expected_place, abs=1e-4), name


@pytest.mark.parametrize("tree", ["cpu-16", "chain"])
def test_outputs_equal_those_without_speculation(
    engine: Callable[..., Any], tiny_heads: Path, use_oracle: Callable[..., Any], tree: str
) -> None:
    names = [*PARAMETERS, "bad_words"]
    prompts = random_prompts(len(names))
    params = [sampling(PARAMETERS[name]) for name in names[:-1]]
    processors = {"logits_processors": [ForbidRecent]}
    with engine(**processors) as llm:
        plain = token_ids(llm.generate(prompts[-1:], sampling({}), use_tqdm=False))
        params.append(bad_words(plain))
        reference = llm.generate(prompts, params, use_tqdm=False)
        assert token_ids(reference[-1:]) != plain
    oracle = use_oracle(prompts, token_ids(reference))
    spec = {"method": "medusa", "model": str(tiny_heads), "tree": tree}
    with engine(speculative_config=spec, **processors) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        check_same(reference, outputs, names)
        accepted = spec_metrics(llm)["num_accepted_tokens_per_pos"]
        assert all(count > 20 for count in accepted[:4]), accepted
        if tree != "chain":
            assert counters(llm)["forks_accepted"] > 100
        # The same seeds give the same texts in another batch.
        alone = [
            llm.generate([p], [s], use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)
        ]
        check_same(reference, alone, names)
    assert len(oracle.chosen) > 4


def test_several_completions_of_a_seeded_request(
    engine: Callable[..., Any], tiny_heads: Path, use_oracle: Callable[..., Any]
) -> None:
    prompts = random_prompts(3, seed=4)
    params = sampling({**SEEDED, "n": 3})
    with engine() as llm:
        reference = llm.generate(prompts, params, use_tqdm=False)
    use_oracle(prompts, token_ids(reference))
    spec = {"method": "medusa", "model": str(tiny_heads), "tree": "cpu-16"}
    with engine(speculative_config=spec) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert counters(llm)["forks_accepted"] > 10
    for expected, output in zip(reference, outputs, strict=True):
        texts = [list(completion.token_ids) for completion in output.outputs]
        assert texts == [list(completion.token_ids) for completion in expected.outputs]
        assert len({tuple(text) for text in texts}) == 3


@pytest.mark.parametrize("mode", ["raw_logits", "processed_logits", "processed_logprobs"])
def test_logprobs_modes(
    engine: Callable[..., Any], tiny_heads: Path, use_oracle: Callable[..., Any], mode: str
) -> None:
    prompts = random_prompts(3, seed=9)
    params = [
        sampling({"logprobs": 3, "presence_penalty": 1.0}),
        sampling({**SEEDED, "logprobs": 3, "top_k": 8}),
        sampling({**SEEDED, "logprobs": 2}),
    ]
    with engine(logprobs_mode=mode) as llm:
        reference = llm.generate(prompts, params, use_tqdm=False)
    use_oracle(prompts, token_ids(reference))
    spec = {"method": "medusa", "model": str(tiny_heads), "tree": "cpu-16"}
    with engine(logprobs_mode=mode, speculative_config=spec) as llm:
        check_same(reference, llm.generate(prompts, params, use_tqdm=False), [mode] * 3)
        assert counters(llm)["forks_accepted"] > 10


def test_native_sampler_noise(
    engine: Callable[..., Any], tiny_heads: Path, use_oracle: Callable[..., Any]
) -> None:
    """The exponential noise of platforms without vLLM's CPU kernel, here with fp64 Gumbel."""
    prompts = random_prompts(4, seed=2)
    params = [sampling({**SEEDED, "seed": seed}) for seed in range(4)]
    with engine(use_fp64_gumbel=True) as llm:
        reference = llm.generate(prompts, params, use_tqdm=False)
    use_oracle(prompts, token_ids(reference))
    spec = {"method": "medusa", "model": str(tiny_heads), "tree": "cpu-16"}
    with engine(use_fp64_gumbel=True, speculative_config=spec) as llm:
        check_same(reference, llm.generate(prompts, params, use_tqdm=False), ["fp64"] * 4)
        assert counters(llm)["forks_accepted"] > 10


def test_thinking_budget_is_refused(engine: Callable[..., Any], tiny_heads: Path) -> None:
    spec = {"method": "medusa", "model": str(tiny_heads)}
    params = sampling({"thinking_token_budget": 5})
    with (
        engine(speculative_config=spec) as llm,
        pytest.raises(VLLMValidationError, match="thinking_token_budget=5 is not supported"),
    ):
        llm.generate(random_prompts(1), params, use_tqdm=False)


def test_vocabulary_of_the_tiny_model() -> None:
    assert max(max(p["prompt_token_ids"]) for p in random_prompts(20)) < tiny.VOCAB_SIZE
