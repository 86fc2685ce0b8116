"""The offline comparison: batches of prompts, variants taking turns, round by round."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_medusa.bench.engines import EnginePool, VariantState
from vllm_medusa.bench.prompts import BenchPrompt, PromptSet
from vllm_medusa.bench.sameness import Mismatch, Sameness, compare_outputs
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.turns import Watcher, take_turns
from vllm_medusa.bench.variants import BASELINE, Variant
from vllm_medusa.engines.engine import EngineInfo, EngineProcess, EngineProcessError, Run

#: Mismatches of a variant that the second pass asks logprobs for.
MAX_EXPLAINED = 50


@dataclass(frozen=True)
class Measurement:
    """One batch of prompts on one variant.

    Attributes:
        variant: its name.
        batch_size: requests at once.
        round: number of the round, from 1.
        prompts: the batch.
        run: what it gave.
    """

    variant: str
    batch_size: int
    round: int
    prompts: Sequence[BenchPrompt]
    run: Run

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all requests over the time of all steps."""
        return self.run.num_tokens / self.run.seconds

    @property
    def load_name(self) -> str:
        """The batch size in words."""
        return batch_name(self.batch_size)

    @property
    def summary(self) -> str:
        """What it gave, in a few words."""
        return f"{self.tokens_per_s:.1f} tokens/s, {self.run.tokens_per_step:.2f} tokens/step"

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON has it, but its steps summed up."""
        run = self.run
        steps = run.decode_step_ms
        return {
            "variant": self.variant,
            "batch_size": self.batch_size,
            "round": self.round,
            "tokens_per_s": self.tokens_per_s,
            "num_tokens": run.num_tokens,
            "seconds": run.seconds,
            "num_steps": len(run.step_ms),
            "tokens_per_step": run.tokens_per_step,
            "median_step_ms": statistics.median(steps),
            "num_drafts": run.num_drafts,
            "num_accepted": run.num_accepted,
            "accepted_by_depth": run.accepted_by_depth,
            "num_preemptions": run.num_preemptions,
            "peak_memory_bytes": run.peak_memory_bytes,
            "device_memory_bytes": run.device_memory_bytes,
            "requests": [
                {
                    "prompt": prompt.id,
                    "category": prompt.category,
                    "num_prompt_tokens": len(prompt.token_ids),
                    "num_tokens": len(token_ids),
                    "num_steps": times.num_steps,
                    "ttft_ms": times.ttft_ms,
                    "tpot_ms": times.tpot_ms,
                }
                for prompt, token_ids, times in zip(
                    self.prompts, run.token_ids, run.requests, strict=True
                )
            ],
        }


def batch_name(batch_size: int) -> str:
    """A batch size in words."""
    return f"batch {batch_size}"


@dataclass(frozen=True)
class OfflineResult:
    """All that an offline comparison gave.

    Attributes:
        measurements: in order of time.
        states: by variant.
        sameness: of each lossless variant that ran, but the baseline.
        kept_all: whether all engines were alive at once.
    """

    measurements: Sequence[Measurement]
    states: Mapping[str, VariantState]
    sameness: Sequence[Sameness]
    kept_all: bool


def rounds_of(settings: Settings) -> dict[int, int]:
    """How many rounds each batch size has."""
    return {
        size: max(settings.rounds, -(-settings.min_prompts // size))
        for size in settings.batch_sizes
    }


def run_offline(
    settings: Settings,
    variants: Sequence[Variant],
    prompts: PromptSet,
    options: Mapping[str, Any],
    environment: Mapping[str, str],
    unavailable: Mapping[str, str],
    watcher: Watcher[int, Measurement],
) -> OfflineResult:
    """Measure all variants.

    Args:
        settings: of the comparison.
        variants: the baseline first.
        prompts: to run.
        options: arguments of ``vllm.LLM`` common to all variants.
        environment: environment variables common to all variants.
        unavailable: reasons by the names of variants that are known not to run here.
        watcher: is told of every turn.

    Raises:
        EngineProcessError: the baseline does not run.
    """
    sampling = {"ignore_eos": settings.ignore_eos}

    def on_start(name: str, engine: EngineProcess, info: EngineInfo) -> None:
        watcher.started(name, info)
        for batch_size in settings.batch_sizes:
            batch = [prompt.token_ids for prompt in prompts.batch(1, batch_size)]
            # All of it: what drafts only when the text repeats has to have drafted.
            engine.run(batch, settings.max_tokens, **sampling)

    def start(variant: Variant) -> EngineProcess:
        return EngineProcess(
            {**options, **variant.llm_options, "speculative_config": variant.speculative},
            {**environment, **variant.environment},
        )

    def measure(engine: EngineProcess, name: str, batch_size: int, number: int) -> Measurement:
        batch = prompts.batch(number, batch_size)
        token_ids = [prompt.token_ids for prompt in batch]
        run = engine.run(token_ids, settings.max_tokens, **sampling)
        return Measurement(name, batch_size, number, batch, run)

    by_name = {variant.name: variant for variant in variants}
    with EnginePool(by_name, start, settings.alive, on_start) as pool:
        measurements = take_turns(pool, rounds_of(settings), unavailable, measure, watcher)
        sameness = [
            explain(pool, prompts, measurements, found) for found in _compare(by_name, measurements)
        ]
    return OfflineResult(measurements, pool.states, sameness, pool.keeps_all)


def _compare(
    variants: Mapping[str, Variant], measurements: Sequence[Measurement]
) -> list[Sameness]:
    outputs: dict[str, dict[tuple[int, int, int], list[int]]] = {name: {} for name in variants}
    prompt_ids = {}
    for measurement in measurements:
        for place, prompt in enumerate(measurement.prompts):
            key = (measurement.batch_size, measurement.round, place)
            outputs[measurement.variant][key] = measurement.run.token_ids[place]
            prompt_ids[key] = prompt.id
    return [
        compare_outputs(name, outputs[BASELINE], outputs[name], lambda *key: prompt_ids[key])
        for name, variant in variants.items()
        if variant.is_lossless and name != BASELINE and outputs[name]
    ]


def explain(
    pool: EnginePool[EngineProcess],
    prompts: PromptSet,
    measurements: Sequence[Measurement],
    found: Sameness,
) -> Sameness:
    """Second pass: ask the baseline for the logprobs of both tokens of each mismatch.

    The baseline gets the prompt, its own output up to the mismatch, and either token. If it has to
    be started for that and does not come up, the mismatches stay without logprobs.
    """
    outputs = {
        (measurement.batch_size, measurement.round, prompt.id): tokens
        for measurement in measurements
        if measurement.variant == BASELINE
        for prompt, tokens in zip(measurement.prompts, measurement.run.token_ids, strict=True)
    }
    token_ids = {prompt.id: list(prompt.token_ids) for prompt in prompts.prompts}
    explained: list[Mismatch] = []
    for mismatch in found.mismatches[:MAX_EXPLAINED]:
        tokens = (mismatch.baseline_token, mismatch.variant_token)
        key = (mismatch.batch_size, mismatch.round, mismatch.prompt_id)
        context = token_ids[mismatch.prompt_id] + outputs[key][: mismatch.position]
        sequences = [[*context, token] for token in tokens if token is not None]
        if len(sequences) == 2:
            try:
                ours, theirs = pool.require(BASELINE).score(sequences)
            except EngineProcessError:
                return found
            mismatch = dataclasses.replace(mismatch, baseline_logprob=ours, variant_logprob=theirs)
        explained.append(mismatch)
    rest = found.mismatches[MAX_EXPLAINED:]
    return dataclasses.replace(found, mismatches=(*explained, *rest))
