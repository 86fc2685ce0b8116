"""Scheduling and memory: whatever the batch goes through, the greedy tokens stay the target's.

The drafts are an oracle's (`tests.tiny.Oracle`), so every leaf path is accepted and committed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from tests.integration.conftest import counters, greedy, random_prompts, spec_metrics
from vllm_medusa.tree.named import named_tree, tree_names

pytestmark = pytest.mark.engine

Engine = Callable[..., Any]
UseOracle = Callable[..., Any]


def medusa(heads: Path, tree: Any = "cpu-16", **keys: Any) -> dict[str, Any]:
    return {"method": "medusa", "model": str(heads), "tree": tree, **keys}


def sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def run_staggered(
    llm: Any, prompts: list[Any], max_tokens: list[int], abort: frozenset[int] = frozenset()
) -> dict[int, list[int]]:
    """Let requests arrive one every other step; abort some in mid-flight."""
    core = llm.llm_engine
    results: dict[int, list[int]] = {}
    running: dict[str, int] = {}
    step = 0
    while running or step // 2 < len(prompts):
        if step % 2 == 0 and step // 2 < len(prompts):
            index = step // 2
            core.add_request(f"request-{index}", prompts[index], sampling(max_tokens[index]))
            running[f"request-{index}"] = index
        for output in core.step():
            tokens = list(output.outputs[0].token_ids)
            index = running[output.request_id]
            if output.finished:
                results[index] = tokens
                del running[output.request_id]
            elif index in abort and len(tokens) > 5:
                core.abort_request([output.request_id])
                del running[output.request_id]
        step += 1
    return results


def free_blocks(llm: Any) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def num_grants(llm: Any) -> int:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return worker.model_runner.forks.grants.num_granted


@pytest.mark.parametrize("block_size", [32, 128])
def test_requests_that_come_and_go(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle, block_size: int
) -> None:
    prompts = random_prompts(14, seed=1, longest=150)
    lengths = [random.Random(i).randint(1, 90) for i in range(len(prompts))]
    options = {"block_size": block_size, "max_num_batched_tokens": 64, "max_num_seqs": 5}
    with engine(**options) as llm:
        reference = greedy(llm, prompts, 90)
    use_oracle(prompts, reference)
    aborted = frozenset({2, 7, 11})
    with engine(**options, speculative_config=medusa(tiny_heads)) as llm:
        before = free_blocks(llm)
        results = run_staggered(llm, prompts, lengths, aborted)
        finished = set(range(len(prompts))) - aborted
        assert finished <= results.keys()
        for index, tokens in results.items():
            assert tokens == reference[index][: lengths[index]], index
        counted = counters(llm)
        assert counted["forks_accepted"] > 50
        # One more request, so that the runner hears of the last ones' end.
        greedy(llm, prompts[:1], 1)
        greedy(llm, prompts[:1], 1)
        assert free_blocks(llm) == before
        assert num_grants(llm) <= 1


@pytest.mark.parametrize("tree", ["mc_sim_7b_63", [[0], [1], [0, 0], [1, 0], [1, 0, 0]], "cpu-8"])
def test_trees(engine: Engine, tiny_heads: Path, use_oracle: UseOracle, tree: Any) -> None:
    prompts = random_prompts(6, seed=2)
    with engine() as llm:
        reference = greedy(llm, prompts, 120)
    oracle = use_oracle(prompts, reference)
    with engine(speculative_config=medusa(tiny_heads, tree)) as llm:
        assert greedy(llm, prompts, 120) == reference
        assert counters(llm)["forks_accepted"] > 50
    assert len(oracle.chosen) > 5


def test_every_node_accepted_gives_its_depth(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle
) -> None:
    """Right up to one leaf at every step: each step emits the leaf's depth + 1 tokens."""
    prompts = random_prompts(1, seed=3)
    with engine() as llm:
        reference = greedy(llm, prompts, 101)
    oracle = use_oracle(prompts, reference)
    with engine(speculative_config=medusa(tiny_heads, "cpu-16")) as llm:
        tree = named_tree("cpu-16", 4)
        for leaf in tree.leaves:
            oracle.fixed_node = leaf
            before = spec_metrics(llm)
            forked = counters(llm)["forks_accepted"]
            assert greedy(llm, prompts, 101) == reference
            after = spec_metrics(llm)
            depth = len(tree.paths[leaf - 1])
            drafts = after["num_drafts"] - before["num_drafts"]
            accepted = after["num_accepted_tokens"] - before["num_accepted_tokens"]
            # The last steps have no future tokens left to be right about.
            assert 100 / (depth + 1) <= drafts <= 100 / (depth + 1) + depth + 1
            assert accepted >= 100 - drafts - depth
            if leaf != tree.leaves[0]:
                assert counters(llm)["forks_accepted"] - forked >= drafts - depth - 1


def test_wrong_drafts_change_nothing(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle
) -> None:
    prompts = random_prompts(2, seed=3)
    with engine() as llm:
        reference = greedy(llm, prompts, 80)
    oracle = use_oracle(prompts, reference)
    oracle.fixed_node = 0
    with engine(speculative_config=medusa(tiny_heads, "cpu-16")) as llm:
        assert greedy(llm, prompts, 80) == reference
        metrics = spec_metrics(llm)
        assert metrics["num_drafts"] > 100
        # Only the heads' own drafts of the last steps, where the oracle knows no future.
        assert metrics["num_accepted_tokens"] <= 2


def test_without_the_commit_the_text_is_wrong(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the tests above can fail."""
    from vllm_medusa.plugin.worker.v1.path_forks import PathForks

    prompts = random_prompts(4, seed=2)
    with engine() as llm:
        reference = greedy(llm, prompts, 80)
    use_oracle(prompts, reference)
    monkeypatch.setattr(PathForks, "commit", lambda self, acceptance: None)
    with engine(speculative_config=medusa(tiny_heads)) as llm:
        outputs = greedy(llm, prompts, 80)
    assert all(output != expected for output, expected in zip(outputs, reference, strict=True))


@pytest.mark.parametrize("tree", ["cpu-32", "chain"])
def test_preemption(engine: Engine, tiny_heads: Path, use_oracle: UseOracle, tree: str) -> None:
    prompts = random_prompts(8, seed=5, longest=60)
    with engine() as llm:
        reference = greedy(llm, prompts, 200)
    use_oracle(prompts, reference)
    spec = medusa(tiny_heads, tree, max_tree_requests=3)
    num_leaves = 1 if tree == "chain" else len(named_tree(tree, 4).leaves)
    blocks = 30 + 3 * 2 * (num_leaves - 1)
    with engine(speculative_config=spec, num_gpu_blocks_override=blocks, max_model_len=320) as llm:
        assert greedy(llm, prompts, 200) == reference
        preempted = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        assert preempted > 0
        if tree != "chain":
            assert counters(llm)["forks_accepted"] > 20
            assert counters(llm)["chain_fallbacks"] > 0


@pytest.mark.parametrize("short_of_limit", [0, 1, 2, 3])
def test_the_longest_sequences(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle, short_of_limit: int
) -> None:
    """A sequence that ends at ``max_model_len`` or just before."""
    max_model_len = 130
    prompts = random_prompts(3, seed=6, longest=40)
    lengths = [max_model_len - len(p["prompt_token_ids"]) - short_of_limit for p in prompts]
    params = [sampling(length) for length in lengths]
    with engine(max_model_len=max_model_len) as llm:
        reference = llm.generate(prompts, params, use_tqdm=False)
    texts = [list(output.outputs[0].token_ids) for output in reference]
    assert [len(text) for text in texts] == lengths
    use_oracle(prompts, texts)
    spec = medusa(tiny_heads, "cpu-32")
    with engine(max_model_len=max_model_len, speculative_config=spec) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == texts
        assert counters(llm)["forks_accepted"] > 10


def test_prefix_cache_hits_on_blocks_that_trees_wrote(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle
) -> None:
    prompts = random_prompts(4, seed=7)
    with engine() as llm:
        reference = greedy(llm, prompts, 200)
    longer = [
        {"prompt_token_ids": prompt["prompt_token_ids"] + text[:150]}
        for prompt, text in zip(prompts, reference, strict=True)
    ]
    use_oracle(prompts + longer, reference + [text[150:] for text in reference])
    with engine(speculative_config=medusa(tiny_heads), enable_prefix_caching=True) as llm:
        assert greedy(llm, prompts, 200) == reference
        hits = {m.name: m.value for m in llm.get_metrics() if "prefix_cache_hits" in m.name}
        assert greedy(llm, longer, 50) == [text[150:] for text in reference]
        after = {m.name: m.value for m in llm.get_metrics() if "prefix_cache_hits" in m.name}
        prompt_only = sum(len(p["prompt_token_ids"]) // 32 * 32 for p in prompts)
        new_hits = after["vllm:prefix_cache_hits"] - hits["vllm:prefix_cache_hits"]
        assert new_hits > prompt_only + 3 * 100
        assert counters(llm)["forks_accepted"] > 50


def test_requests_beyond_the_pool_draft_a_chain(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle
) -> None:
    prompts = random_prompts(6, seed=8)
    with engine() as llm:
        reference = greedy(llm, prompts, 80)
    use_oracle(prompts, reference)
    spec = medusa(tiny_heads, max_tree_requests=2)
    with engine(speculative_config=spec) as llm:
        assert greedy(llm, prompts, 80) == reference
        counted = counters(llm)
    assert counted["chain_fallbacks"] > 20
    assert counted["forks_accepted"] > 10


def test_token_budget_cuts_trees_short(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle
) -> None:
    """With fewer tokens a step than the batch's trees have, the scheduler keeps a prefix."""
    prompts = random_prompts(5, seed=9)
    with engine(max_num_batched_tokens=64) as llm:
        reference = greedy(llm, prompts, 100)
    use_oracle(prompts, reference)
    with engine(max_num_batched_tokens=64, speculative_config=medusa(tiny_heads, "cpu-24")) as llm:
        assert greedy(llm, prompts, 100) == reference
        metrics = spec_metrics(llm)
        assert metrics["num_draft_tokens"] < 24 * metrics["num_drafts"]
        assert counters(llm)["forks_accepted"] > 20


def test_sliding_window(tmp_path: Path, tiny_heads: Path, use_oracle: UseOracle) -> None:
    """A model whose layers alternate between full and windowed attention: two KV-cache groups."""
    from tests import tiny
    from tests.integration.conftest import open_engine

    model = tiny.make_windowed_model(tmp_path / "windowed")
    prompts = random_prompts(5, seed=10, longest=120)
    with open_engine(model) as llm:
        reference = greedy(llm, prompts, 120)
    use_oracle(prompts, reference)
    with open_engine(model, speculative_config=medusa(tiny_heads)) as llm:
        assert greedy(llm, prompts, 120) == reference
        assert counters(llm)["forks_accepted"] > 50
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        assert len(groups) == 2


def test_nine_published_trees() -> None:
    assert len([name for name in tree_names() if named_tree(name, 4).num_draft_tokens == 63]) == 9
