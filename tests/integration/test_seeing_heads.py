"""Heads that see the last token, and selectors, in an engine: lossless, and the oracle's drafts."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.command_line import DEMO_MODEL
from tests.integration.conftest import counters, draft_with, greedy, open_engine, spec_metrics
from tests.integration.seeing_heads import SlowHeads, write_seeing_heads
from tests.oracles import heads as oracle

pytestmark = pytest.mark.engine

NUM_PROMPTS, MAX_TOKENS = 6, 48
KINDS = {
    "root-aware": {"has_selector": False},
    "selector": {"has_root": False},
    "both": {},
}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    with (DEMO_MODEL.parent / "prompts.jsonl").open() as lines:
        return [json.loads(line)["prompt"] for line in itertools.islice(lines, NUM_PROMPTS)]


def demo_engine(**options: Any) -> Any:
    # Prompts run in chunks, so that some rows of a batch have sampled nothing.
    return open_engine(DEMO_MODEL, skip_tokenizer_init=False, max_num_batched_tokens=100, **options)


@pytest.fixture(scope="module")
def reference(prompts: list[str]) -> list[list[int]]:
    with demo_engine() as llm:
        return greedy(llm, prompts, MAX_TOKENS)


#: Hidden states, roots and drafts.
Kept = list[tuple[torch.Tensor, int, Any]]


class Recorder:
    """Drafts as the runner's own drafter; keeps what it was asked and what it answered."""

    def __init__(self, kept: Kept, runner: Any) -> None:
        self._kept = kept
        self._drafter = runner.tree_drafter

    def num_paths(self, batch_size: int) -> int:
        return self._drafter.num_paths(batch_size)

    def finish(self, req_ids: Any) -> None:
        self._drafter.finish(req_ids)

    def draft(self, batch: Any) -> list[Any]:
        drafts = self._drafter.draft(batch)
        rows = zip(batch.hidden_states, batch.sampled, drafts, strict=True)
        self._kept += [(h.clone(), s[-1], d) for h, s, d in rows if s and d.tokens]
        return drafts


def with_logits(heads: SlowHeads, kept: Kept) -> Iterator[tuple[torch.Tensor, int, Any]]:
    """Some of the drafts, with the slow heads' logits [K, V] and the root."""
    for hidden, root, draft in kept[:: max(1, len(kept) // 40)]:
        yield heads.logits(hidden, root), root, draft


def check_against_oracle(path: Path, kept: Kept) -> None:
    """Static trees whose nodes have the tokens that the slow heads give them, one by one."""
    slow = SlowHeads(path)
    heads, differs = slow.checkpoint, 0
    for rows, root, draft in with_logits(slow, kept):
        paths = rank_paths(draft.parents)
        assert draft.tokens == oracle.draft(heads, rows, root, paths)
        best = rows.topk(16).indices
        differs += draft.tokens != [int(best[len(path) - 1, path[-1]]) for path in paths]
    assert not heads.spec.selector_rank or differs > 5


def rank_paths(parents: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The rank paths of a tree whose siblings are in the order of their ranks."""
    paths: list[tuple[int, ...]] = [()]
    for parent in parents:
        rank = sum(path[:-1] == paths[parent] and path != () for path in paths)
        paths.append((*paths[parent], rank))
    return paths[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_static_trees(
    prompts: list[str], reference: list[list[int]], tmp_path: Path, kind: str
) -> None:
    path = write_seeing_heads(tmp_path / "heads", **KINDS[kind])
    kept: Kept = []
    spec = {"method": "medusa", "model": str(path), "tree": "cpu-16"}
    with demo_engine(speculative_config=spec) as llm:
        draft_with(llm, lambda runner: Recorder(kept, runner))
        assert greedy(llm, prompts, MAX_TOKENS) == reference
        assert counters(llm)["forks_accepted"] > NUM_PROMPTS
        assert spec_metrics(llm)["num_accepted_tokens"] > NUM_PROMPTS * MAX_TOKENS / 4
    check_against_oracle(path, kept)


@pytest.mark.parametrize("kind", ["root-aware", "both"])
def test_dynamic_trees(
    prompts: list[str], reference: list[list[int]], tmp_path: Path, kind: str
) -> None:
    """Dynamic trees, the default: with a selector too."""
    path = write_seeing_heads(tmp_path / "heads", **KINDS[kind])
    kept: Kept = []
    bounds = {"sources": ["heads"], "measure_costs": False}
    spec = {"method": "medusa", "model": str(path), **bounds}
    with demo_engine(speculative_config=spec) as llm:
        draft_with(llm, lambda runner: Recorder(kept, runner))
        assert greedy(llm, prompts, MAX_TOKENS) == reference
        assert counters(llm)["forks_accepted"] > NUM_PROMPTS
        assert spec_metrics(llm)["num_accepted_tokens"] > NUM_PROMPTS * MAX_TOKENS / 4
    check_nodes_against_oracle(path, kept)


def check_nodes_against_oracle(path: Path, kept: Kept) -> None:
    """Dynamic trees: a node's children have the tokens that the slow heads rank first below it."""
    slow = SlowHeads(path)
    heads, differs = slow.checkpoint, 0
    for rows, root, draft in with_logits(slow, kept):
        tokens, depths, children = [root, *draft.tokens], [0], defaultdict(set)
        for token, parent in zip(draft.tokens, draft.parents, strict=True):
            depths.append(depths[parent] + 1)
            children[parent].add(token)
        for parent, found in children.items():
            head = depths[parent]
            best = oracle.ranking(heads, head, rows[head], tokens[parent])
            assert found == set(best[: len(found)])
            differs += found != set(rows[head].topk(len(found)).indices.tolist())
    assert (differs > 5) == (heads.spec.selector_rank is not None)
