"""Measures what the engine accepts, on prompts that no tree was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_medusa.acceptance.intervals import Estimate, ratio, resample
from vllm_medusa.acceptance.texts import counted_positions
from vllm_medusa.calibration.texts import Request, batches
from vllm_medusa.engines.engine import Run, start_engine
from vllm_medusa.reporting.progress import Progress
from vllm_medusa.tree.draft_tree import TreePath

#: Requests that run at the same time: each needs its forks, or it would draft a chain.
_REQUESTS_AT_ONCE = 16


@dataclass(frozen=True)
class Checked:
    """Tokens per step that the engine emitted with a tree, over the steps that count.

    Attributes:
        method: method that made the tree.
        size: number of its draft nodes.
        with_loops: over all steps that count.
        without_loops: over those before the text begins to loop.

    """

    method: str
    size: int
    with_loops: Estimate
    without_loops: Estimate


def check_trees(
    options: Mapping[str, Any],
    heads: Mapping[str, Any],
    trees: Sequence[tuple[str, int, Sequence[TreePath]]],
    requests: Sequence[Request],
    *,
    max_tokens: int,
    num_heads: int,
    seed: int,
    progress: Progress,
) -> list[Checked]:
    """Continue prompts greedily with every tree and count what the steps emit.

    Args:
        options: arguments of ``vllm.LLM``.
        heads: ``speculative_config`` without a tree.
        trees: method, size and paths of each.
        requests: requests to continue.
        max_tokens: number of tokens to generate for each.
        num_heads: of the heads.
        seed: seed of the resamples.
        progress: counts requests.

    """
    resamples = resample(len(requests), seed)
    checked = []
    for method, size, paths in trees:
        counts = []
        config = {
            **heads,
            "tree": [list(path) for path in paths],
            "max_tree_requests": _REQUESTS_AT_ONCE,
        }
        at_once = min(_REQUESTS_AT_ONCE, options.get("max_num_seqs", _REQUESTS_AT_ONCE))
        given = {**options, "max_num_seqs": at_once, "speculative_config": config}
        with start_engine(given) as engine:
            for batch in batches(requests):
                run = engine.run([r.token_ids for r in batch], max_tokens)
                counts += steps_of(run, num_heads)
                progress(len(batch))
        by_prompt = np.array(counts, dtype=np.int64)
        estimates = [ratio(by_prompt[:, kind], resamples) for kind in (0, 1)]
        checked.append(Checked(method, size, *estimates))
    return checked


def steps_of(run: Run, num_heads: int) -> list[list[list[int]]]:
    """Count the steps of a run that begin at positions that count.

    Returns:
        [prompts, 2, 2]: tokens and steps, of all text and of the text before loops.

    """
    counts = []
    for times, tokens in zip(run.requests, run.token_ids, strict=True):
        counted = counted_positions(tokens, times.has_ended, num_heads)
        # The prompt's own step emits the first step's root.
        roots = np.cumsum(times.emitted)[:-1] - 1
        emitted = np.array(times.emitted[1:])
        steps = [emitted[roots < limit] for limit in (counted.total, counted.before_loop)]
        counts.append([[int(some.sum()), len(some)] for some in steps])
    return counts
