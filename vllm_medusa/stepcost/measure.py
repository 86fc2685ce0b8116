"""The step-cost profile: an engine's step time over draft tokens per request and batch size.

Real trees run through the plugin. Every tree is an engine in a process of its own; all take turns,
round by round. A round's figure is the median time of the steps in which the whole batch decodes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from vllm_medusa.engines.engine import EngineProcess, default_threads, start_engine
from vllm_medusa.reporting.progress import Progress
from vllm_medusa.stepcost.costs import StepCost, StepCosts
from vllm_medusa.tree.draft_tree import DraftTree, TreePath

#: Tokens of the prompts of timed steps.
PROMPT_TOKENS = 128
MAX_TOKENS = 48
ROUNDS = 5


def trees_to_measure(
    paths: Sequence[TreePath], sizes: Sequence[int], num_heads: int
) -> list[tuple[TreePath, ...]]:
    """Return no tree, the chain of all heads, and trees of the first ``paths`` in these sizes."""
    trees = {tuple(paths[:size]) for size in sizes}
    chain = DraftTree.chain(num_heads).paths
    return [(), chain, *sorted(trees - {chain}, key=len)]


def measure_step_costs(
    options: Mapping[str, Any],
    heads: Mapping[str, Any],
    trees: Sequence[tuple[TreePath, ...]],
    token_ids: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    rounds: int = ROUNDS,
    engines_at_once: int | None = None,
    environment: Mapping[str, str] | None = None,
    progress: Progress = lambda _: None,
    provenance: Mapping[str, Any] | None = None,
) -> StepCosts:
    """Time the steps of every tree at every batch size.

    Args:
        options: arguments of ``vllm.LLM``.
        heads: ``speculative_config`` without a tree.
        trees: paths of each; no paths is no speculation, which must be among them.
        token_ids: text to cut prompts from.
        batch_sizes: batch sizes to measure.
        rounds: number of timed rounds, after one that warms up.
        engines_at_once: engines in memory at the same time; the others run after them and are not
            interleaved with them. None: all.
        environment: environment variables of the engines, beside the caller's own.
        progress: counts runs, one warm-up and ``rounds`` for each tree and batch size.
        provenance: kept with the result.

    Raises:
        UserError: if an engine does not start.

    """
    rows: list[StepCost] = []
    at_once = engines_at_once or len(trees)
    for start in range(0, len(trees), at_once):
        group = trees[start : start + at_once]
        with ExitStack() as stack:
            engines = [
                stack.enter_context(
                    start_engine(with_tree(options, heads, tree, max(batch_sizes)), environment)
                )
                for tree in group
            ]
            for batch_size in sorted(set(batch_sizes)):
                prompts = cut_prompts(token_ids, batch_size)
                times = _time_rounds(engines, prompts, rounds, progress)
                rows += [
                    StepCost(batch_size, len(tree), _num_leaves(tree), tuple(tree_times))
                    for tree, tree_times in zip(group, times, strict=True)
                ]
    facts = {
        "prompt_tokens": PROMPT_TOKENS,
        "max_tokens": MAX_TOKENS,
        "rounds": rounds,
        "engines_at_once": at_once,
        "options": dict(options),
        "environment": {"OMP_NUM_THREADS": str(default_threads()), **(environment or {})},
    }
    return StepCosts(rows, {**facts, **(provenance or {})})


def cut_prompts(token_ids: Sequence[int], count: int) -> list[list[int]]:
    """Cut prompts of `PROMPT_TOKENS` tokens from a text; they overlap if it is short."""
    text = list(token_ids)
    while len(text) < PROMPT_TOKENS:
        text += token_ids
    last = len(text) - PROMPT_TOKENS
    stride = min(PROMPT_TOKENS, last / max(1, count - 1))
    starts = [round(index * stride) for index in range(count)]
    return [text[start : start + PROMPT_TOKENS] for start in starts]


def _time_rounds(
    engines: Sequence[EngineProcess], prompts: list[list[int]], rounds: int, progress: Progress
) -> list[list[float]]:
    """Return by engine the median step of every round."""
    times: list[list[float]] = [[] for _ in engines]
    for number in range(rounds + 1):
        for engine, engine_times in zip(engines, times, strict=True):
            run = engine.run(prompts, MAX_TOKENS, ignore_eos=True)
            if number:  # the first one warms up
                engine_times.append(statistics.median(run.decode_step_ms))
            progress(1)
    return times


def with_tree(
    options: Mapping[str, Any],
    heads: Mapping[str, Any],
    tree: tuple[TreePath, ...],
    max_batch_size: int,
) -> dict[str, Any]:
    """Return the options of an engine with a tree, given by its paths, or without speculation."""
    if not tree:
        return dict(options)
    # Every request of the largest batch needs its forks, or it would draft a chain.
    paths = [list(path) for path in tree]
    config = {**heads, "tree": paths, "max_tree_requests": max_batch_size}
    return {**options, "speculative_config": config}


def _num_leaves(tree: tuple[TreePath, ...]) -> int:
    return len(DraftTree.from_paths(tree).leaves) if tree else 0
