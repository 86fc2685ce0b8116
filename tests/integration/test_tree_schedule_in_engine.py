"""Tree schedules on the real engine: each batch size drafts its tree, and outputs stay the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.integration.conftest import counters, greedy, random_prompts
from vllm_medusa.tree.schedule import TreeSchedule, write_schedule_file

pytestmark = pytest.mark.engine

LARGE = [[0], [1], [0, 0], [1, 0], [0, 1], [0, 0, 0], [2]]
SMALL = [[0], [1], [1, 0]]
#: Draft nodes by batch size: 7 for one request, 3 for two to four, none for more.
SCHEDULE = TreeSchedule.from_entries([(1, LARGE), (4, SMALL), (None, [])])


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    path = tiny.make_heads(tmp_path / "heads", num_heads=3)
    write_schedule_file(path / "medusa_tree_schedule.json", SCHEDULE)
    return path


def record_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The number of drafts of each request, for every step from now on."""
    from vllm_medusa.plugin.worker.v1.sampler import TreeSampler

    steps: list[list[int]] = []
    forward = TreeSampler.forward

    def recorded(self: Any, metadata: Any, *args: Any) -> Any:
        steps.append(list(metadata.num_draft_tokens))
        return forward(self, metadata, *args)

    monkeypatch.setattr(TreeSampler, "forward", recorded)
    return steps


def test_each_batch_size_drafts_its_tree(
    engine: Callable[..., Any],
    heads: Path,
    use_oracle: Callable[..., tiny.Oracle],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = random_prompts(6)
    max_tokens = [10, 14, 30, 60, 90, 140]
    with engine() as llm:
        longest = greedy(llm, prompts, max_tokens=max_tokens[-1])
    oracle = use_oracle(prompts, longest)
    steps = record_steps(monkeypatch)
    with engine(
        speculative_config={"method": "medusa", "model": str(heads), "tree": "static"}
    ) as llm:
        steps.clear()
        outputs = generate_each(llm, prompts, max_tokens)
        counted = counters(llm)
    expected = [tokens[:count] for tokens, count in zip(longest, max_tokens, strict=True)]
    assert outputs == expected
    drafted = {1: 7, 2: 3, 3: 3, 4: 3, 5: 0, 6: 0}
    seen: dict[int, int] = {}
    for before, counts in itertools.pairwise(steps):
        # The step before drafted for this one; close to its end a request may have fewer.
        assert max(counts) <= drafted[len(before)]
        if max(counts) == drafted[len(before)]:
            seen[len(before)] = seen.get(len(before), 0) + 1
    assert all(seen[size] > 1 for size in (1, 3, 6)), seen
    assert counted["forks_accepted"] > 10
    assert oracle.chosen.keys() == set(range(8))


def generate_each(llm: Any, prompts: list[Any], max_tokens: list[int]) -> list[list[int]]:
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        for count in max_tokens
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
