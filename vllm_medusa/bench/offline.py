"""The offline comparison: batches of prompts, variants taking turns, round by round."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_medusa.bench.engines import EnginePool, VariantState
from vllm_medusa.bench.process import EngineInfo, EngineProcess, EngineProcessError, Run
from vllm_medusa.bench.prompts import BenchPrompt, PromptSet
from vllm_medusa.bench.sameness import Mismatch, Sameness, compare_outputs
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.variants import BASELINE, Variant

#: Tokens of a warm-up, at most: enough for every code path to have run.
WARM_UP_TOKENS = 16
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


class Watcher(Protocol):
    """Is told what happens while it happens."""

    def expect(
        self,
        turns: Sequence[tuple[str, int]],
        states: Mapping[str, VariantState],
        kept_all: bool,
    ) -> None:
        """The baseline is up; turns to come, as variant and batch size, starts left out."""

    def turn_of(self, variant: str) -> None:
        """A variant's turn begins."""

    def started(self, variant: str, info: EngineInfo) -> None:
        """A variant's engine is up."""

    def measured(self, measurement: Measurement) -> None:
        """A turn has ended."""

    def dropped(self, variant: str, reason: str) -> None:
        """A variant takes no part any more."""


def schedule(
    rounds: int, batch_sizes: Sequence[int], names: Sequence[str], keeps_all: bool
) -> Iterator[tuple[int, int, str]]:
    """Turns as (round, batch size, variant).

    With all engines alive the variants take turns at every batch. One at a time they do so
    round by round, each with all batch sizes, as every start takes long.
    """
    for number in range(1, rounds + 1):
        if keeps_all:
            for batch_size in batch_sizes:
                for name in names:
                    yield number, batch_size, name
        else:
            for name in names:
                for batch_size in batch_sizes:
                    yield number, batch_size, name


def run_offline(
    settings: Settings,
    variants: Sequence[Variant],
    prompts: PromptSet,
    options: Mapping[str, Any],
    environment: Mapping[str, str],
    unavailable: Mapping[str, str],
    watcher: Watcher,
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
            engine.run(batch, min(settings.max_tokens, WARM_UP_TOKENS), **sampling)

    def start(variant: Variant) -> EngineProcess:
        return EngineProcess(
            {**options, **variant.llm_options, "speculative_config": variant.speculative},
            {**environment, **variant.environment},
        )

    by_name = {variant.name: variant for variant in variants}
    measurements: list[Measurement] = []
    with EnginePool(by_name, start, settings.alive, on_start) as pool:
        for name, reason in unavailable.items():
            pool.states[name].unavailable = reason
            watcher.dropped(name, reason)
        watcher.turn_of(BASELINE)
        _started(pool, BASELINE)
        turns = list(schedule(settings.rounds, settings.batch_sizes, [*by_name], pool.keeps_all))
        expected = [(name, size) for _, size, name in turns if pool.states[name].is_running]
        watcher.expect(expected, pool.states, pool.keeps_all)
        for number, batch_size, name in turns:
            if not pool.states[name].is_running:
                continue
            watcher.turn_of(name)
            batch = prompts.batch(number, batch_size)
            run = _run(pool, name, batch, settings.max_tokens, sampling)
            if run is None:
                watcher.dropped(name, pool.states[name].reason or "")
                continue
            measurements.append(Measurement(name, batch_size, number, batch, run))
            watcher.measured(measurements[-1])
        sameness = [
            explain(pool, settings, prompts, measurements, found)
            for found in _compare(by_name, measurements)
        ]
    return OfflineResult(measurements, pool.states, sameness, pool.keeps_all)


def _started(pool: EnginePool[EngineProcess], name: str) -> EngineProcess:
    """The engine of a variant that has to run."""
    engine = pool.get(name)
    if engine is None:
        raise EngineProcessError(str(pool.states[name].reason))
    return engine


def _run(
    pool: EnginePool[EngineProcess],
    name: str,
    batch: Sequence[BenchPrompt],
    max_tokens: int,
    sampling: Mapping[str, Any],
) -> Run | None:
    """One turn; None if the variant broke off, which only the baseline must not."""
    if name == BASELINE:
        engine: EngineProcess | None = _started(pool, name)
    else:
        engine = pool.get(name)
    if engine is None:
        return None
    try:
        return engine.run([prompt.token_ids for prompt in batch], max_tokens, **sampling)
    except EngineProcessError as exc:
        if name == BASELINE:
            raise
        pool.give_up(name, exc)
        return None


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
    settings: Settings,
    prompts: PromptSet,
    measurements: Sequence[Measurement],
    found: Sameness,
) -> Sameness:
    """Second pass: ask the baseline for the logprobs of both tokens of each mismatch.

    The baseline gets the prompt, its own output up to the mismatch, and either token.
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
            ours, theirs = _started(pool, BASELINE).score(sequences)
            mismatch = dataclasses.replace(mismatch, baseline_logprob=ours, variant_logprob=theirs)
        explained.append(mismatch)
    rest = found.mismatches[MAX_EXPLAINED:]
    return dataclasses.replace(found, mismatches=(*explained, *rest))
