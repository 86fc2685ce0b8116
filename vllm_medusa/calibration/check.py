"""What the engine itself accepts, on prompts that no tree was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_medusa.bench.process import Run
from vllm_medusa.calibration.estimates import Estimate, ratio, resample
from vllm_medusa.calibration.paths import loop_start
from vllm_medusa.calibration.texts import Progress, Request, batches, start_engine
from vllm_medusa.tree.draft_tree import TreePath


@dataclass(frozen=True)
class Measured:
    """Tokens per step that the engine emitted, over the same steps as the predictions.

    Attributes:
        with_loops: over all steps.
        without_loops: over those whose drafts all lie before the text begins to loop.

    """

    with_loops: Estimate
    without_loops: Estimate


def measure_acceptance(
    options: Mapping[str, Any],
    heads: Mapping[str, Any],
    paths: Sequence[TreePath],
    requests: Sequence[Request],
    *,
    max_tokens: int,
    num_heads: int,
    temperature: float,
    seed: int,
    progress: Progress,
) -> Measured:
    """Run an engine with a tree and count what its steps emit.

    Args:
        options: arguments of ``vllm.LLM``.
        heads: ``speculative_config`` without a tree.
        paths: the tree's.
        requests: to continue.
        max_tokens: of a continuation; a few more are asked for, so that the limit cuts no step
            that counts.
        num_heads: of the heads.
        temperature: to sample at; 0 is greedy.
        seed: of the resamples.
        progress: counts requests.

    """
    counts = []
    config = {**heads, "tree": [list(path) for path in paths]}
    with start_engine({**options, "speculative_config": config}) as engine:
        for batch in batches(requests):
            prompts = [request.token_ids for request in batch]
            run = engine.run(prompts, max_tokens + num_heads, temperature=temperature)
            counts += steps_of(run, max_tokens, num_heads)
            progress(len(batch))
    by_prompt = np.array(counts, dtype=np.int64)
    resamples = resample(len(counts), seed)
    return Measured(ratio(by_prompt[:, 0], resamples), ratio(by_prompt[:, 1], resamples))


def steps_of(run: Run, max_tokens: int, num_heads: int) -> list[list[list[int]]]:
    """Count the steps of a run that begin where the statistics have positions.

    Returns:
        [prompts, 2, 2]: tokens and steps, of all text and of that before loops.

    """
    counts = []
    for times, tokens in zip(run.requests, run.token_ids, strict=True):
        before_loop = loop_start(tokens) - num_heads
        position = times.emitted[0] - 1
        every, looped_not = [0, 0], [0, 0]
        for emitted in times.emitted[1:]:
            if position >= max_tokens - 1:
                break
            for count in (every, looped_not) if position < before_loop else (every,):
                count[0] += emitted
                count[1] += 1
            position += emitted
        counts.append([every, looped_not])
    return counts
