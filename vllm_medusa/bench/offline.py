"""The offline comparison: batches of prompts, variants taking turns, round by round."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from vllm_medusa.bench.categories import BatchMeasurement, categories_of
from vllm_medusa.bench.engines import EnginePool
from vllm_medusa.bench.figures import OFFLINE
from vllm_medusa.bench.plan import Plan
from vllm_medusa.bench.prompts import BenchPrompt
from vllm_medusa.bench.report import Findings, category_table, mismatch_table, sameness_table
from vllm_medusa.bench.sameness import TIE_LOGPROB, Mismatch, Sameness, compare_outputs
from vllm_medusa.bench.settings import Settings
from vllm_medusa.bench.variants import BASELINE, VLLM_CHAIN, Variant
from vllm_medusa.engines.engine import EngineProcess, Run
from vllm_medusa.engines.process import EngineProcessError
from vllm_medusa.reporting.tables import Table

#: Mismatches of a variant that the second pass asks logprobs for.
MAX_EXPLAINED = 50
#: Sources of nodes in the plugin's counters, and their headings in a table.
_SOURCES = {"heads": "heads", "text": "text", "shared_text": "shared text"}


def measurement_of(
    variant: str, batch_size: int, number: int, prompts: Sequence[BenchPrompt], run: Run
) -> BatchMeasurement:
    """Return the measurement of a run of a batch; its line summarises the steps."""
    speed = run.num_tokens / run.seconds
    peaks = {
        "peak_memory_bytes": run.peak_memory_bytes,
        "device_memory_bytes": run.device_memory_bytes,
    }
    line = {
        "tokens_per_s": speed,
        "num_tokens": run.num_tokens,
        "seconds": run.seconds,
        "num_steps": len(run.step_ms),
        "tokens_per_step": run.tokens_per_step,
        "median_step_ms": statistics.median(run.decode_step_ms),
        "num_drafts": run.num_drafts,
        "num_accepted": run.num_accepted,
        "accepted_by_depth": run.accepted_by_depth,
        "num_preemptions": run.num_preemptions,
        "medusa": run.medusa,
        **peaks,
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
            for prompt, token_ids, times in zip(prompts, run.token_ids, run.requests, strict=True)
        ],
    }
    return BatchMeasurement(
        variant=variant,
        load=batch_size,
        round=number,
        speed=speed,
        samples={
            "tokens_per_s": [speed],
            "tokens_per_step": [run.tokens_per_step],
            "num_steps": [len(run.step_ms)],
            "step_ms": run.decode_step_ms,
            "ttft_ms": [times.ttft_ms for times in run.requests],
            "tpot_ms": [times.tpot_ms for times in run.requests if times.tpot_ms is not None],
        },
        num_drafts=run.num_drafts,
        accepted_by_depth=run.accepted_by_depth,
        totals={"num_preemptions": run.num_preemptions},
        peaks=peaks,
        summary=f"{speed:.1f} tokens/s, {run.tokens_per_step:.2f} tokens/step",
        line=line,
        prompts=prompts,
        run=run,
    )


def rounds_of(settings: Settings) -> dict[int, int]:
    """Return the number of rounds of each batch size."""
    return {
        size: max(settings.rounds, -(-settings.min_prompts // size))
        for size in sorted(settings.batch_sizes)
    }


class Offline:
    """The offline mode, as `run.compare` drives it.

    Args:
        plan: plan of the comparison.
    """

    kind = OFFLINE

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.rounds = rounds_of(plan.settings)

    def start(self, variant: Variant) -> EngineProcess:
        """Start a variant's engine."""
        own = {**variant.llm_options, "speculative_config": variant.speculative}
        return EngineProcess(
            {**self._plan.options, **own}, {**self._plan.environment, **variant.environment}
        )

    def warm_up(self, engine: EngineProcess) -> None:
        """Run the first round's batches completely, so that drafting from text warms up too."""
        for batch_size in self.rounds:
            self._run(engine, self._plan.prompts.batch(1, batch_size))

    def measure(
        self, engine: EngineProcess, variant: str, batch_size: int, number: int
    ) -> BatchMeasurement:
        """Run the batch of a round."""
        batch = self._plan.prompts.batch(number, batch_size)
        return measurement_of(variant, batch_size, number, batch, self._run(engine, batch))

    def _run(self, engine: EngineProcess, batch: Sequence[BenchPrompt]) -> Run:
        settings = self._plan.settings
        prompts = [prompt.token_ids for prompt in batch]
        return engine.run(
            prompts,
            settings.max_tokens,
            seeds=[settings.seed + index for index in range(len(prompts))],
            temperature=settings.temperature,
            ignore_eos=settings.ignore_eos,
        )

    def conclude(
        self, pool: EnginePool[EngineProcess], measurements: Sequence[BatchMeasurement]
    ) -> Findings:
        """Compare the outputs, and summarise by category."""
        settings = self._plan.settings
        # The strictest for ``auto``.
        dtype = settings.dtype if settings.dtype in TIE_LOGPROB else "float32"
        sameness = [
            explain(pool, measurements, found) for found in compare(self._compared(), measurements)
        ]
        categories = categories_of(measurements)
        lossy = [v.name for v in self._plan.variants if not v.is_lossless]
        notes = [f"Lossy, so their outputs were not compared: {', '.join(lossy)}."] if lossy else []
        if settings.temperature:
            notes.append(
                f"Sampled at temperature {settings.temperature}, each request with a seed. vLLM's "
                "own methods draw other random numbers, so their outputs were not compared."
            )
        different = [found.in_words(dtype) for found in sameness if found.mismatches]
        return Findings(
            tables=[
                source_table(measurements),
                category_table(categories),
                sameness_table(sameness, dtype),
                mismatch_table(sameness, dtype),
            ],
            results={
                "categories": [dataclasses.asdict(figures) for figures in categories],
                "sameness": [found.to_json(dtype) for found in sameness],
            },
            notes=notes,
            complaint=f"--strict: outputs differ from the baseline's: {', '.join(different)}; see "
            f"{settings.out}/report.md"
            if different
            else None,
        )

    def _compared(self) -> list[Variant]:
        """Return the variants whose outputs have to be the baseline's."""
        variants = [variant for variant in self._plan.variants if variant.is_lossless]
        if not self._plan.settings.temperature:
            return variants
        # vLLM's samplers draw other numbers for the same seed as soon as there are drafts.
        return [
            variant
            for variant in variants
            if (variant.speculative or {}).get("method") == "medusa" and variant.name != VLLM_CHAIN
        ]


def source_table(measurements: Sequence[BatchMeasurement]) -> Table:
    """Draft nodes of dynamic trees by source, and how many were accepted."""
    table = Table(
        "Dynamic trees: nodes a step, and by source nodes drafted / accepted (a node of two "
        "sources counts for both)",
        ("variant", "batch", "nodes/step", "steps without drafts", *_SOURCES.values()),
    )
    counted: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    for measurement in measurements:
        counts = counted[measurement.variant, measurement.load]
        counts.update(measurement.run.medusa)
        counts["steps"] += len(measurement.run.step_ms)
    for (variant, batch_size), counts in counted.items():
        if counts["nodes_drafted"] or counts["steps_without_drafts"]:
            by_source = (f"{counts[f'{s}_nodes']} / {counts[f'{s}_accepted']}" for s in _SOURCES)
            nodes = f"{counts['nodes_drafted'] / counts['steps']:.1f}"
            table.add(variant, batch_size, nodes, counts["steps_without_drafts"], *by_source)
    return table


def compare(
    variants: Sequence[Variant], measurements: Sequence[BatchMeasurement]
) -> list[Sameness]:
    """Compare the outputs of each variant that ran with the baseline's."""
    outputs: dict[str, dict[tuple[int, int, int], Any]] = defaultdict(dict)
    prompt_ids = {}
    for measurement in measurements:
        for place, prompt in enumerate(measurement.prompts):
            key = (measurement.load, measurement.round, place)
            outputs[measurement.variant][key] = measurement.run.token_ids[place]
            prompt_ids[key] = prompt.id
    return [
        compare_outputs(
            variant.name, outputs[BASELINE], outputs[variant.name], lambda *key: prompt_ids[key]
        )
        for variant in variants
        if variant.name != BASELINE and variant.name in outputs
    ]


def explain(
    pool: EnginePool[EngineProcess], measurements: Sequence[BatchMeasurement], found: Sameness
) -> Sameness:
    """Second pass: ask the baseline for the logprobs of both tokens of each mismatch.

    The baseline gets the prompt, its own output up to the mismatch, and each of the two tokens. If
    it must be started for this and does not start, the mismatches have no logprobs.
    """
    before = {
        (measurement.load, measurement.round, prompt.id): (prompt.token_ids, tokens)
        for measurement in measurements
        if measurement.variant == BASELINE
        for prompt, tokens in zip(measurement.prompts, measurement.run.token_ids, strict=True)
    }
    explained: list[Mismatch] = []
    for mismatch in found.mismatches[:MAX_EXPLAINED]:
        tokens = (mismatch.baseline_token, mismatch.variant_token)
        prompt, output = before[mismatch.batch_size, mismatch.round, mismatch.prompt_id]
        context = [*prompt, *output[: mismatch.position]]
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
