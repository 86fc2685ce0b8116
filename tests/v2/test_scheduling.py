"""Whatever the scheduler does to a request, its text is that of no speculation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.integration.conftest import greedy, spec_metrics
from tests.v2.conftest import MAX_TOKENS
from tests.v2.oracle import oracle
from tests.v2.trees import spec

pytestmark = pytest.mark.usefixtures("fast_attention")

Engine = Callable[..., Any]


def metric(llm: Any, name: str) -> int:
    return next(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def test_prompts_in_chunks_beside_trees(
    engine: Engine, tiny_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    """A budget so small that steps mix parts of prompts with trees, and cuts trees."""
    with (
        oracle(prompts[:4], reference[:4]),
        engine(speculative_config=spec(tiny_heads), max_num_batched_tokens=40) as llm,
    ):
        assert greedy(llm, prompts[:4], MAX_TOKENS) == reference[:4]
        assert spec_metrics(llm)["num_accepted_tokens"] > 20


def test_preemption(
    engine: Engine, tiny_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    with (
        oracle(prompts, reference),
        engine(
            speculative_config=spec(tiny_heads),
            num_gpu_blocks_override=9,
            max_model_len=128,
            enable_prefix_caching=False,
        ) as llm,
    ):
        assert greedy(llm, prompts, MAX_TOKENS) == reference
        assert metric(llm, "num_preemptions") > 0


def test_prefix_cache_holds_what_was_accepted(
    engine: Engine, tiny_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    """Blocks that trees filled serve a longer prompt; one that ends there begins with padding."""
    whole = [
        {"prompt_token_ids": [*prompt["prompt_token_ids"], *text]}
        for prompt, text in zip(prompts, reference, strict=True)
    ]
    whole = [prompt for prompt in whole if len(prompt["prompt_token_ids"]) > 66][:3]
    cut = [{"prompt_token_ids": prompt["prompt_token_ids"][:65]} for prompt in whole]
    assert len(whole) > 1
    with engine(enable_prefix_caching=False) as llm:
        wanted = greedy(llm, whole, 10), greedy(llm, cut, 10)
    with (
        oracle(prompts, reference) as drafts,
        engine(speculative_config=spec(tiny_heads), enable_prefix_caching=True) as llm,
    ):
        assert greedy(llm, prompts, MAX_TOKENS) == reference
        before = metric(llm, "prefix_cache_hits")
        for again, texts in zip((whole, cut), wanted, strict=True):
            drafts.expect(again, texts)
            assert greedy(llm, again, 10) == texts
        assert metric(llm, "prefix_cache_hits") - before >= 2 * 64 * len(whole)


def test_longest_text(
    engine: Engine, tiny_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    """Trees are cut where the model's length ends."""
    longest = max(prompts, key=lambda prompt: len(prompt["prompt_token_ids"]))
    text = reference[prompts.index(longest)]
    length = len(longest["prompt_token_ids"]) + 15
    with (
        oracle([longest], [text]),
        engine(speculative_config=spec(tiny_heads), max_model_len=length) as llm,
    ):
        params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([longest], params, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == text[:15]


def test_aborted_requests_leave_nothing_behind(
    engine: Engine, tiny_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    with (
        oracle(prompts, reference),
        engine(speculative_config=spec(tiny_heads), max_num_seqs=3) as llm,
    ):
        core = llm.llm_engine
        for index, prompt in enumerate(prompts[:3]):
            core.add_request(str(index), prompt, params)
        for _ in range(4):
            core.step()
        core.abort_request([str(index) for index in range(3)])
        assert greedy(llm, prompts[:4], MAX_TOKENS) == reference[:4]


@pytest.mark.parametrize(
    "options",
    [
        {"tree": "chain", "num_speculative_tokens": 3},
        {"num_speculative_tokens_per_batch_size": [[1, 2, 12], [3, 8, 5]]},
    ],
    ids=["chain", "sizes by batch"],
)
def test_other_trees(
    engine: Engine,
    tiny_heads: Path,
    prompts: list[Any],
    reference: list[list[int]],
    options: dict[str, Any],
) -> None:
    settings = {"method": "medusa", "model": str(tiny_heads), **options}
    with oracle(prompts, reference), engine(speculative_config=settings) as llm:
        assert greedy(llm, prompts[:3], MAX_TOKENS) == reference[:3]
        metrics = spec_metrics(llm)
        assert metrics["num_accepted_tokens"] > 10
        if "tree" not in options:
            assert metrics["num_draft_tokens"] < 6 * metrics["num_drafts"]


def test_synchronous_scheduling(
    engine: Engine, tiny_heads: Path, prompts: list[Any], reference: list[list[int]]
) -> None:
    with (
        oracle(prompts[:2], reference[:2]),
        engine(speculative_config=spec(tiny_heads), async_scheduling=False) as llm,
    ):
        assert not llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        assert greedy(llm, prompts[:2], MAX_TOKENS) == reference[:2]
        assert spec_metrics(llm)["num_accepted_tokens"] > 10


@pytest.mark.parametrize("is_async", [True, False], ids=["asynchronous", "synchronous"])
def test_a_requests_own_max_nodes(
    engine: Engine,
    tiny_heads: Path,
    prompts: list[Any],
    reference: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    is_async: bool,
) -> None:
    """No step runs more drafts than its request wants; one that wants none gets no draft."""
    from vllm_medusa.plugin.worker.v2.sampler import TreeSampler

    bounds, seen = [0, 3, None], dict[int, int]()
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if bound is None else {"medusa": {"max_nodes": bound}},
        )
        for bound in bounds
    ]
    original = TreeSampler.__call__

    def call(self: Any, logits: Any, batch: Any, *args: Any) -> Any:
        for req_id, drafts in zip(batch.req_ids, batch.num_draft_tokens_per_req, strict=True):
            place = int(req_id.split("-")[0])
            seen[place] = max(seen.get(place, 0), int(drafts))
        return original(self, logits, batch, *args)

    monkeypatch.setattr(TreeSampler, "__call__", call)
    settings = spec(tiny_heads)
    with (
        oracle(prompts[:3], reference[:3]),
        engine(speculative_config=settings, async_scheduling=is_async) as llm,
    ):
        outputs = llm.generate(prompts[:3], params, use_tqdm=False)
        assert spec_metrics(llm)["num_accepted_tokens"] > 5
    assert [list(output.outputs[0].token_ids) for output in outputs] == reference[:3]
    assert seen == {0: 0, 1: 3, 2: 16}


@pytest.mark.parametrize("wrong", ["mask", "positions", "compaction"])
def test_without_it_the_text_is_another(
    engine: Engine,
    tiny_heads: Path,
    prompts: list[Any],
    reference: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    wrong: str,
) -> None:
    """The tests above would find each of these faults."""
    from vllm_medusa.plugin.worker.v2 import runner

    original = runner.TreeRunnerMixin._prepare_trees

    def prepare(self: Any, input_batch: Any) -> None:
        tokens = slice(0, input_batch.num_tokens)
        before = self.trees.positions[tokens].clone()
        original(self, input_batch)
        if wrong == "mask":
            self.trees.ancestors[tokens] = -1
        else:
            self.trees.positions[tokens] = before

    if wrong == "compaction":
        monkeypatch.setattr(runner, "compact", lambda *_: None)
    else:
        monkeypatch.setattr(runner.TreeRunnerMixin, "_prepare_trees", prepare)
    with (
        oracle(prompts[:3], reference[:3]),
        engine(speculative_config=spec(tiny_heads)) as llm,
    ):
        assert greedy(llm, prompts[:3], MAX_TOKENS) != reference[:3]
