"""Heads that run in turn, in an engine: lossless, and the oracle's drafts."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.integration.command_line import DEMO_MODEL
from tests.integration.conftest import counters, draft_with, open_engine, spec_metrics, token_ids
from tests.integration.sequential_heads import (
    SlowHydra,
    write_native_hydra,
    write_published_hydra,
    write_speculator_of,
)
from tests.integration.test_seeing_heads import Kept, Recorder, rank_paths

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 6, 48
WRITERS = {"native": write_native_hydra, "published": write_published_hydra}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    with (DEMO_MODEL.parent / "prompts.jsonl").open() as lines:
        return [json.loads(line)["prompt"] for line in itertools.islice(lines, NUM_PROMPTS)]


def generate(llm: Any, prompts: list[str]) -> list[list[int]]:
    """Half of the texts greedy, half sampled with a seed."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0.8 * (i % 2),
            seed=i,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            detokenize=False,
        )
        for i in range(len(prompts))
    ]
    return token_ids(llm.generate(prompts, params, use_tqdm=False))


def demo_engine(**options: Any) -> Any:
    return open_engine(DEMO_MODEL, skip_tokenizer_init=False, **options)


@pytest.fixture(scope="module")
def reference(prompts: list[str]) -> list[list[int]]:
    with demo_engine() as llm:
        return generate(llm, prompts)


def check_lossless(
    spec: dict[str, Any], prompts: list[str], reference: list[list[int]], **options: Any
) -> Kept:
    """The same texts, by drafts of which many are accepted, some of them on forks."""
    kept: Kept = []
    with demo_engine(speculative_config={"method": "medusa", **spec}, **options) as llm:
        draft_with(llm, lambda runner: Recorder(kept, runner))
        assert generate(llm, prompts) == reference
        assert counters(llm)["forks_accepted"] > NUM_PROMPTS
        assert spec_metrics(llm)["num_accepted_tokens"] > NUM_PROMPTS * MAX_TOKENS / 6
    assert len(kept) > 20
    return kept


@pytest.mark.parametrize("form", WRITERS)
def test_static_trees(
    prompts: list[str], reference: list[list[int]], tmp_path: Path, form: str
) -> None:
    path = WRITERS[form](tmp_path / "heads")
    kept = check_lossless({"model": str(path), "tree": "cpu-16"}, prompts, reference)
    slow, differs = SlowHydra(path), 0
    for hidden, root, draft in kept[:: max(1, len(kept) // 20)]:
        tokens: dict[tuple[int, ...], list[int]] = {(): [root]}
        by_depth = defaultdict(set)
        for rank_path, token in zip(rank_paths(draft.parents), draft.tokens, strict=True):
            above = tokens[rank_path[:-1]]
            best = slow.logits(hidden, above).topk(16).indices.tolist()
            assert token == best[rank_path[-1]]
            tokens[rank_path] = [*above, token]
            by_depth[len(rank_path), rank_path[-1]].add(token)
        # Medusa heads would draft one token at each depth and rank.
        differs += sum(len(found) > 1 for found in by_depth.values())
    assert differs > 5


@pytest.mark.parametrize("sources", [["heads"], ["heads", "text"]], ids=str)
def test_dynamic_trees(
    prompts: list[str], reference: list[list[int]], tmp_path: Path, sources: list[str]
) -> None:
    path = write_native_hydra(tmp_path / "heads")
    spec = {"model": str(path), "sources": sources, "measure_costs": False}
    kept = check_lossless(spec, prompts, reference)
    if "text" in sources:
        return
    slow = SlowHydra(path)
    for hidden, root, draft in kept[:: max(1, len(kept) // 20)]:
        texts, children = [[root]], defaultdict(set)
        for token, parent in zip(draft.tokens, draft.parents, strict=True):
            texts.append([*texts[parent], token])
            children[parent].add(token)
        for parent, found in children.items():
            best = slow.logits(hidden, texts[parent]).topk(len(found)).indices.tolist()
            assert found == set(best)


@pytest.mark.parametrize("tree", ["static", "dynamic"])
def test_mlp_speculator(
    prompts: list[str], reference: list[list[int]], tmp_path: Path, tree: str
) -> None:
    path = write_speculator_of(reference, tmp_path / "heads")
    paths = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]]
    options = {"tree": paths} if tree == "static" else {"sources": ["heads"]}
    if tree == "dynamic":
        options |= {"tree": "dynamic", "measure_costs": False}
    check_lossless({"model": str(path), **options}, prompts, reference)


def test_costs_are_measured(prompts: list[str], reference: list[list[int]], tmp_path: Path) -> None:
    """The default: the heads' own cost is measured at the start and weighed."""
    spec = {"method": "medusa", "model": str(write_native_hydra(tmp_path / "heads"))}
    with demo_engine(speculative_config=spec) as llm:
        assert generate(llm, prompts) == reference
        assert counters(llm)["heads_runs"] > 0
