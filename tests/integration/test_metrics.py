"""What the engine says of its trees: vLLM's metrics, ours beside them, and the start-up line.

The page of a server is read in `test_serve.py`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.metrics.loggers import PrometheusStatLogger

from tests.integration.conftest import (
    counters,
    greedy,
    open_engine,
    random_prompts,
    spec_metrics,
    token_ids,
)
from vllm_medusa.plugin.counters import DESCRIPTIONS, Counters
from vllm_medusa.tree.named import named_tree

pytestmark = pytest.mark.engine

Engine = Callable[..., Any]
UseOracle = Callable[..., Any]
PREFIX = "vllm:medusa_"
NONE_COUNTED = dict.fromkeys(DESCRIPTIONS, 0)
OF_STATIC_TREES = ("forked_requests", "fork_paths", "forks_accepted", "chain_fallbacks")
PROMPTS = random_prompts(8, seed=3)


def medusa(heads: Path, tree: Any = "cpu-16", **keys: Any) -> dict[str, Any]:
    return {"method": "medusa", "model": str(heads), "tree": tree, **keys}


def medusa_metrics(llm: Any) -> dict[str, int]:
    return {
        metric.name.removeprefix(PREFIX): metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith(PREFIX)
    }


def generate(llm: Any, prompts: list[Any], lengths: list[int]) -> list[list[int]]:
    params = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        for length in lengths
    ]
    return token_ids(llm.generate(prompts, params, use_tqdm=False))


def increase(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [new - old for new, old in zip(value, before[name], strict=True)]
        if isinstance(value, list)
        else value - before[name]
        for name, value in after.items()
    }


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> list[list[int]]:
    """What the target continues `PROMPTS` with; its engine has no metrics of ours."""
    with open_engine(tiny_model) as llm:
        texts = greedy(llm, PROMPTS, 110)
        assert medusa_metrics(llm) == {}
        return texts


def test_increases_add_up() -> None:
    totals = Counters()
    assert totals.to_dict() == NONE_COUNTED
    assert totals.take_increase() == {}
    totals.forks_accepted += 2
    assert totals.take_increase() == {"forks_accepted": 2}
    totals.forks_accepted += 1
    totals.fork_paths += 5
    assert totals.take_increase() == {"forks_accepted": 1, "fork_paths": 5}
    assert totals.take_increase() == {}
    assert totals.to_dict() == {**NONE_COUNTED, "forks_accepted": 3, "fork_paths": 5}


def test_counters_are_metrics_of_each_engine(
    engine: Engine,
    tiny_heads: Path,
    use_oracle: UseOracle,
    reference: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Engines one after the other in one process: each has its own counts, or none.

    The counts travel in a field of vLLM's, and must be out of it before vLLM's loggers look.
    """
    use_oracle(PROMPTS, reference)
    seen: list[set[str]] = []
    record = PrometheusStatLogger.record

    def spy(self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(set(scheduler_stats.num_kv_fetch_reqs_by_stage))
        record(self, scheduler_stats, *args, **kwargs)

    monkeypatch.setattr(PrometheusStatLogger, "record", spy)
    for max_tree_requests in (2, 3):
        spec = medusa(tiny_heads, max_tree_requests=max_tree_requests)
        with engine(speculative_config=spec, served_model_name="tiny") as llm:
            assert medusa_metrics(llm) == NONE_COUNTED
            for _ in range(2):
                greedy(llm, PROMPTS, 60)
                # What the very last step counted is there as well.
                assert medusa_metrics(llm) == counters(llm)
            assert all(medusa_metrics(llm)[name] for name in OF_STATIC_TREES)
            labels = [m.labels for m in llm.get_metrics() if m.name.startswith(PREFIX)]
            assert labels == [{"model_name": "tiny", "engine": "0"}] * len(DESCRIPTIONS)
    with engine() as llm:
        greedy(llm, PROMPTS, 5)
        assert medusa_metrics(llm) == {}
    assert len(seen) > 100
    assert all(stages == seen[0] for stages in seen)
    assert not any("medusa" in stage for stage in seen[0])


def test_counters_of_dynamic_trees_are_metrics(engine: Engine, tiny_heads: Path) -> None:
    spec = medusa(tiny_heads, "dynamic", shared_text=True, measure_costs=False)
    with engine(speculative_config=spec) as llm:
        for _ in range(2):
            greedy(llm, PROMPTS, 60)
            assert medusa_metrics(llm) == counters(llm)
        counted, metrics = medusa_metrics(llm), spec_metrics(llm)
    sources = ("heads", "text", "shared_text")
    assert all(counted[f"{name}_nodes"] > 0 for name in sources)
    assert counted["shared_text_accepted"] > 100
    assert sum(counted[f"{name}_accepted"] for name in sources) >= metrics["num_accepted_tokens"]
    assert max(counted[f"{name}_nodes"] for name in sources) <= counted["nodes_drafted"]


def test_without_statistics(engine: Engine, tiny_heads: Path) -> None:
    with engine(speculative_config=medusa(tiny_heads), disable_log_stats=True) as llm:
        greedy(llm, PROMPTS[:2], 20)
        assert counters(llm)["fork_paths"] > 0
        assert llm.llm_engine.logger_manager is None


@pytest.mark.parametrize("tree", ["cpu-16", "mc_sim_7b_63", "chain"])
def test_metrics_of_known_acceptance_are_exact(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle, reference: list[list[int]], tree: str
) -> None:
    """Right up to one leaf at every step, in requests that end with a step's last token."""
    draft_tree = named_tree(tree, 4)
    first, *others = draft_tree.leaves
    oracle = use_oracle(PROMPTS, reference)
    steps = [3, 8, 12]
    spec = medusa(tiny_heads, tree, max_tree_requests=len(steps))
    # No prefix cache: when it leaves one token of a prompt to compute, vLLM's scheduler adds
    # placeholder drafts to it, and its metrics count them, whatever the method.
    with engine(speculative_config=spec, enable_prefix_caching=False) as llm:
        for leaf in [first, *others[:2], *others[-1:]]:
            oracle.fixed_node = leaf
            depth = len(draft_tree.paths[leaf - 1])
            lengths = [1 + num_steps * (depth + 1) for num_steps in steps]
            metrics, counted = spec_metrics(llm), medusa_metrics(llm)
            outputs = generate(llm, PROMPTS[: len(steps)], lengths)
            assert [len(output) for output in outputs] == lengths
            per_position = [sum(steps)] * depth + [0] * (draft_tree.depth - depth)
            assert increase(spec_metrics(llm), metrics) == {
                "num_drafts": sum(steps),
                "num_draft_tokens": sum(steps) * draft_tree.num_draft_tokens,
                "num_accepted_tokens": sum(steps) * depth,
                "num_accepted_tokens_per_pos": per_position,
            }
            assert increase(medusa_metrics(llm), counted) == {
                **NONE_COUNTED,
                "forked_requests": sum(steps) if others else 0,
                "fork_paths": sum(steps) * len(others),
                "forks_accepted": 0 if leaf == first else sum(steps),
                "chain_fallbacks": 0,
            }


def test_sums_are_consistent(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle, reference: list[list[int]]
) -> None:
    """Right up to random nodes, with fork blocks for some of the requests."""
    tree = named_tree("cpu-32", 4)
    rng = random.Random(3)
    lengths = [rng.randint(20, 100) for _ in PROMPTS]
    use_oracle(PROMPTS, reference)
    spec = medusa(tiny_heads, "cpu-32", max_tree_requests=3)
    with engine(speculative_config=spec, max_num_seqs=5) as llm:
        outputs = generate(llm, PROMPTS, lengths)
        metrics, counted = spec_metrics(llm), medusa_metrics(llm)
    assert outputs == [text[:n] for text, n in zip(reference, lengths, strict=True)]
    drafts, accepted = metrics["num_drafts"], metrics["num_accepted_tokens"]
    per_position = metrics["num_accepted_tokens_per_pos"]
    assert len(per_position) == tree.depth
    assert sum(per_position) == accepted
    assert drafts >= per_position[0]
    assert per_position == sorted(per_position, reverse=True)
    assert all(per_position)
    # A prompt emits one token, a step those accepted and one more. The last step of a request may
    # accept more than the request still wants.
    surplus = accepted + drafts + len(PROMPTS) - sum(lengths)
    assert 0 <= surplus <= tree.depth * len(PROMPTS)
    # Requests without fork blocks draft the first path alone.
    trees = counted["forked_requests"]
    assert 0 < counted["forks_accepted"] < trees < drafts
    first_path = len(tree.paths[tree.leaves[0] - 1])
    assert metrics["num_draft_tokens"] == (
        trees * tree.num_draft_tokens + (drafts - trees) * first_path
    )
    # The drafts of a request's last step are counted, but not verified.
    assert 0 <= counted["chain_fallbacks"] - (drafts - trees) <= len(PROMPTS)


def test_the_start_up_line(
    engine: Engine, tiny_heads: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vllm_logger = logging.getLogger("vllm")
    caplog.set_level(logging.INFO, "vllm")
    vllm_logger.addHandler(caplog.handler)
    try:
        with engine(speculative_config=medusa(tiny_heads, max_tree_requests=3)) as llm:
            model = llm.llm_engine.vllm_config.model_config.hf_config
    finally:
        vllm_logger.removeHandler(caplog.handler)
    tree = named_tree("cpu-16", 4)
    # A path of 4 nodes and the context's partial block may reach into a second block.
    blocks = 3 * (len(tree.leaves) - 1) * 2
    key_value_bytes = 2 * model.num_key_value_heads * model.head_dim * 4
    fork_bytes = blocks * 32 * model.num_hidden_layers * key_value_bytes
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Medusa: heads")]
    assert lines == [
        f"Medusa: heads {tiny_heads}, tree cpu-16 (16 nodes, {len(tree.leaves)} leaves, "
        f"depth {tree.depth}), acceptance lossless, forks for 3 requests in {blocks} KV blocks "
        f"({fork_bytes / 2**20:.1f} MiB)"
    ]


def test_the_log_line_has_a_position_for_each_depth(
    engine: Engine, tiny_heads: Path, use_oracle: UseOracle, reference: list[list[int]]
) -> None:
    use_oracle(PROMPTS, reference)
    seen: list[list[int]] = []
    with engine(speculative_config=medusa(tiny_heads, "cpu-32")) as llm:
        loggers = llm.llm_engine.logger_manager.stat_loggers
        record = loggers[-1].record

        def spy(scheduler_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats.spec_decoding_stats is not None:
                seen.append(scheduler_stats.spec_decoding_stats.num_accepted_tokens_per_pos)
            record(scheduler_stats, *args, **kwargs)

        loggers[-1].record = spy
        greedy(llm, PROMPTS, 20)
    assert {len(positions) for positions in seen} == {named_tree("cpu-32", 4).depth}
