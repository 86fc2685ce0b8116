"""Typical acceptance in an engine: its rule, whom it concerns, and what is refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.integration.command_line import DEMO_MODEL, MEDUSA_HEADS
from tests.integration.conftest import greedy, open_engine, spec_metrics, token_ids
from tests.oracles.typical import taken_tokens, typical_path
from vllm_medusa.errors import UserError
from vllm_medusa.plugin import arguments
from vllm_medusa.plugin.worker.v1 import sampler

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 6, 40
#: All but certain that a token counts.
ANY_TOKEN = {"posterior_threshold": 1e-12}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    with (DEMO_MODEL.parent / "prompts.jsonl").open() as lines:
        return [json.loads(line)["prompt"] for line in itertools.islice(lines, NUM_PROMPTS)]


def demo_engine(**speculative: Any) -> Any:
    options: dict[str, Any] = {"skip_tokenizer_init": False}
    if speculative:
        options["speculative_config"] = {
            "method": "medusa",
            "model": str(MEDUSA_HEADS),
            **speculative,
        }
    return open_engine(DEMO_MODEL, **options)


def seeded(llm: Any, prompts: list[str], **medusa: Any) -> list[list[int]]:
    """Texts of seeded requests of which every second has options of its own."""
    params = [
        SamplingParams(
            temperature=0.8,
            seed=i,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args={"medusa": medusa} if medusa and i % 2 else None,
        )
        for i in range(len(prompts))
    ]
    return token_ids(llm.generate(prompts, params, use_tqdm=False))


def tokens_per_step(llm: Any) -> float:
    found = spec_metrics(llm)
    return 1 + found["num_accepted_tokens"] / found["num_drafts"]


def test_rule_in_an_engine(prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def record(rows: Any, targets: Any, drafts: Any, logits: Any, bounds: Any) -> torch.Tensor:
        taken = sampler_take(rows, targets, drafts, logits, bounds)
        kept.append((rows, targets, drafts, logits.double().softmax(dim=-1), bounds, taken))
        return taken

    sampler_take = sampler.take_typical
    monkeypatch.setattr(sampler, "take_typical", record)
    with demo_engine(tree="cpu-8") as llm:
        seeded(llm, prompts)
        lossless = tokens_per_step(llm)
        assert not kept
    warnings: list[str] = []
    monkeypatch.setattr(arguments.logger, "warning", warnings.append)
    with demo_engine(tree="cpu-8", acceptance="typical", posterior_alpha=0.2) as llm:
        assert "acceptance='typical' is lossy" in warnings[0]
        seeded(llm, prompts)
        assert tokens_per_step(llm) > 1.1 * lossless
    num_changed = num_other_paths = 0
    for rows, targets, drafts, probs, bounds, taken in kept:
        for req, (first, last) in enumerate(itertools.pairwise(rows.starts)):
            assert bounds.thresholds[req].item() == pytest.approx(0.09)
            tokens = [-1, *drafts[req, : last - first - 1].tolist()]
            parents = rows.parents[req, : len(tokens)].tolist()
            path = typical_path(parents, tokens, probs[first:last].tolist(), 0.09, 0.2)
            sampled = targets[req, : len(tokens)].tolist()
            wanted = taken_tokens(path, tokens, sampled)
            assert taken[req, : len(tokens)].tolist() == wanted
            num_changed += wanted != sampled
            num_other_paths += path != list(range(len(path)))
    assert num_changed > MAX_TOKENS / 2
    assert num_other_paths > MAX_TOKENS / 4


def test_whom_it_concerns(prompts: list[str]) -> None:
    with demo_engine() as llm:
        expected, greedy_text = seeded(llm, prompts), greedy(llm, prompts, MAX_TOKENS)
    with demo_engine(tree="chain") as llm:
        found = seeded(llm, prompts, acceptance="typical", **ANY_TOKEN)
        assert found[::2] == expected[::2]
        assert all(a != b for a, b in zip(found[1::2], expected[1::2], strict=True))
    with demo_engine(
        tree="chain", num_speculative_tokens=3, acceptance="typical", **ANY_TOKEN
    ) as llm:
        assert greedy(llm, prompts, MAX_TOKENS) == greedy_text
        before = spec_metrics(llm)
        found = seeded(llm, prompts, acceptance="lossless")
        assert found[1::2] == expected[1::2]
        # Of the others every draft was accepted: the first token comes with the prompt.
        after = spec_metrics(llm)
        seeded(llm, prompts[:1])
        steps = spec_metrics(llm)["num_drafts"] - after["num_drafts"]
        assert steps == -(-(MAX_TOKENS - 1) // 4)
        assert after["num_drafts"] > before["num_drafts"]
        assert found[::2] != expected[::2]


def test_refused(prompts: list[str]) -> None:
    for values, message in (
        ({"acceptance": "fast"}, r"acceptance='fast' is not supported; use 'lossless'"),
        ({"posterior_alpha": 0.3}, r"posterior_alpha=0.3 is for acceptance='typical'"),
        ({"acceptance": "typical", "posterior_threshold": 2}, r"posterior_threshold=2 must be"),
    ):
        with pytest.raises(UserError, match=message), demo_engine(**values):
            pass
    with demo_engine(tree="chain") as llm:
        for values, message in (
            ({"acceptance": "fast"}, r"acceptance='fast' must be 'lossless' or 'typical'"),
            ({"posterior_alpha": 0.3}, r"posterior_alpha=0.3 is for acceptance='typical'"),
            ({"acceptance": "typical", "posterior_alpha": "a"}, r"posterior_alpha='a' must be"),
        ):
            with pytest.raises(VLLMValidationError, match=message):
                seeded(llm, prompts[:2], **values)
        with pytest.raises(VLLMValidationError, match=r"is for sampling, but temperature=0"):
            greedy(llm, prompts, extra_args={"medusa": {"acceptance": "typical"}})
