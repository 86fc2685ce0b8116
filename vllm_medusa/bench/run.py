"""A whole comparison: settings in, results and report out."""

from __future__ import annotations

import dataclasses
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from vllm_medusa.bench.display import Display
from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.errors import BenchError
from vllm_medusa.bench.figures import categories_of, figures_of
from vllm_medusa.bench.offline import Measurement, OfflineResult, run_offline
from vllm_medusa.bench.plots import plot_offline
from vllm_medusa.bench.process import EngineProcessError
from vllm_medusa.bench.prompts import PromptSet, load_prompts
from vllm_medusa.bench.provenance import provenance, vllm_version
from vllm_medusa.bench.report import Report, markdown, speed_table
from vllm_medusa.bench.results import (
    LINES,
    LineWriter,
    measurement_to_json,
    prepare_out,
    sameness_to_json,
    to_json,
    variant_to_json,
    write_results,
)
from vllm_medusa.bench.sameness import TIE_LOGPROB
from vllm_medusa.bench.settings import Settings, engine_environment, engine_options
from vllm_medusa.bench.tables import Table, as_text
from vllm_medusa.bench.variants import (
    BASELINE,
    VLLM_CHAIN,
    UnavailableError,
    Variant,
    missing_requirement,
    with_built_in_heads,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is common to the offline and the online comparison, settled before engines start.

    Attributes:
        settings: of the user.
        variants: the baseline first.
        unavailable: reasons by the names of variants that cannot run here.
        prompts: the set.
        options: arguments of ``vllm.LLM`` common to all variants.
        environment: environment variables common to all variants.
        provenance: without the accelerator's name.
    """

    settings: Settings
    variants: Sequence[Variant]
    unavailable: Mapping[str, str]
    prompts: PromptSet
    options: Mapping[str, Any]
    environment: Mapping[str, str]
    provenance: Mapping[str, Any]


def make_plan(settings: Settings, folder: Path) -> Plan:
    """Check and prepare everything that needs no engine.

    Args:
        settings: of the user.
        folder: for files that the variants need; it has to stay until the end.

    Raises:
        BenchError, DataError: something that the user has to mend.
    """
    variants = settings.parsed_variants()
    version = vllm_version()
    unavailable: dict[str, str] = {}
    ready = []
    for variant in variants:
        try:
            if (reason := missing_requirement(variant, version)) is not None:
                raise UnavailableError(reason)
            if variant.name == VLLM_CHAIN:
                heads = settings.heads or settings.model
                variant = with_built_in_heads(variant, heads, settings.model, folder)
        except UnavailableError as exc:
            unavailable[variant.name] = str(exc)
        ready.append(variant)
    prepare_out(settings.out)
    has_gpu = _has_gpu()
    return Plan(
        settings=settings,
        variants=ready,
        unavailable=unavailable,
        prompts=load_prompts(
            settings.prompts,
            _load_tokenizer(settings),
            random_len=settings.random_len,
            seed=settings.seed,
        ),
        options=engine_options(settings, has_gpu),
        environment=engine_environment(settings, has_gpu),
        provenance=provenance(None),
    )


def run(settings: Settings) -> str:
    """Compare, write the results, return what to print.

    Raises:
        BenchError: something that the user has to mend; with ``strict``, also differing outputs.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-medusa-bench-") as folder, ends_on_sigterm():
        plan = make_plan(settings, Path(folder))
        try:
            return _offline(plan)
        except EngineProcessError as exc:
            raise BenchError(f"the baseline does not run: {exc.reason}") from None


class _Watcher:
    """Shows the turns of an offline comparison and writes their lines."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._states: Mapping[str, VariantState] = {}
        self._lines: LineWriter | None = None
        self._measurements: list[Measurement] = []
        self.display = Display(self._table)

    def _table(self) -> Table:
        return speed_table(figures_of(self._measurements), self._states)

    def expect(
        self,
        turns: Sequence[tuple[str, int]],
        states: Mapping[str, VariantState],
        kept_all: bool,
    ) -> None:
        """See `offline.Watcher`."""
        self._states = states
        self._lines = LineWriter(
            self._plan.settings.out / LINES,
            {"provenance": _provenance(self._plan, states), "settings": _settings(self._plan)},
        )
        self.display.expect([f"{name}/{size}" for name, size in turns])

    def starting(self, variant: str) -> None:
        """See `offline.Watcher`."""
        self.display.begin(f"now: {variant}")

    def measured(self, measurement: Measurement) -> None:
        """See `offline.Watcher`."""
        self._measurements.append(measurement)
        if self._lines:
            self._lines.add(measurement_to_json(measurement))
        self.display.done(
            f"{measurement.variant}/{measurement.batch_size}",
            f"round {measurement.round}, batch {measurement.batch_size}, {measurement.variant}: "
            f"{measurement.tokens_per_s:.1f} tokens/s, "
            f"{measurement.run.tokens_per_step:.2f} tokens/step",
        )

    def dropped(self, variant: str, reason: str) -> None:
        """See `offline.Watcher`."""
        self.display.drop(
            lambda kind: kind.rpartition("/")[0] == variant, f"{variant}: left out: {reason}"
        )


def _offline(plan: Plan) -> str:
    watcher = _Watcher(plan)
    settings = plan.settings
    with watcher.display:
        result = run_offline(
            settings,
            plan.variants,
            plan.prompts,
            plan.options,
            plan.environment,
            plan.unavailable,
            watcher,
        )
    figures = figures_of(result.measurements)
    notes = [*plan.prompts.notes, *_notes(plan, result)]
    report = Report(
        figures=figures,
        categories=categories_of(result.measurements),
        sameness=result.sameness,
        states=result.states,
        dtype=tie_dtype(settings),
        notes=notes,
    )
    tables = report.tables()
    write_results(
        settings.out,
        {
            "mode": "offline",
            "provenance": _provenance(plan, result.states),
            "settings": _settings(plan),
            "variants": [variant_to_json(v, result.states[v.name]) for v in plan.variants],
            "figures": to_json(figures),
            "categories": to_json(report.categories),
            "sameness": [sameness_to_json(found, report.dtype) for found in result.sameness],
            "notes": notes,
        },
    )
    plots = plot_offline(settings.out, figures)
    text = markdown(tables, notes, plots, _provenance(plan, result.states), _settings(plan))
    (settings.out / "report.md").write_text(text, encoding="utf-8")
    printed = as_text(tables)
    if settings.strict:
        watcher.display.say(printed)
        check_sameness(result, report.dtype, settings.out)
    return "\n".join([printed, *notes, f"written to {settings.out}"])


def check_sameness(result: OfflineResult, dtype: str, out: Path) -> None:
    """Fail a strict run.

    Raises:
        BenchError: any output of a lossless variant differs from the baseline's.
    """
    different = [found for found in result.sameness if found.mismatches]
    if not different:
        return
    counts = []
    for found in different:
        ties = sum(mismatch.is_near_tie(dtype) for mismatch in found.mismatches)
        counts.append(
            f"{found.variant} {len(found.mismatches)} of {found.num_compared} ({ties} near-ties)"
        )
    raise BenchError(
        f"--strict: outputs differ from the baseline's: {', '.join(counts)}; see {out}/report.md"
    )


def _notes(plan: Plan, result: OfflineResult) -> list[str]:
    """What a reader of the figures has to know."""
    notes = [
        "All engines were alive at once and took turns at every batch."
        if result.kept_all
        else "One engine was alive at a time and started again for every round, with a warm-up."
    ]
    names = {m.variant for m in result.measurements if m.run.num_preemptions}
    if names:
        notes.append(
            f"Requests of {', '.join(sorted(names))} were preempted: the KV cache is too small for "
            "these batches, which the times show; give kv_cache_memory_bytes in --llm-options."
        )
    lossy = [v.name for v in plan.variants if not v.is_lossless]
    if lossy:
        notes.append(f"Lossy, so their outputs were not compared: {', '.join(lossy)}.")
    return notes


def tie_dtype(settings: Settings) -> str:
    """The dtype that decides what a near-tie is: float32, the strictest, for ``auto``."""
    return settings.dtype if settings.dtype in TIE_LOGPROB else "float32"


def _settings(plan: Plan) -> dict[str, Any]:
    common = {"engine_options": plan.options, "environment": plan.environment}
    return plan.settings.to_json() | common


def _provenance(plan: Plan, states: Mapping[str, VariantState]) -> dict[str, Any]:
    machine = dict(plan.provenance["machine"])
    machine["device"] = states[BASELINE].starts[0].device_name
    return {**plan.provenance, "machine": machine}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _load_tokenizer(settings: Settings) -> Any:
    from transformers import AutoTokenizer

    name = settings.llm_options.get("tokenizer") or settings.model
    trust = bool(settings.llm_options.get("trust_remote_code", False))
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
    except (OSError, ValueError) as exc:
        first = str(exc).strip().splitlines()[0]
        raise BenchError(f"--model {settings.model}: no usable tokenizer ({first})") from None


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Within it SIGTERM ends the program as an exception does, so that engines are stopped."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
