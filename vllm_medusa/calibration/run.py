"""A calibration from its settings to its files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_medusa.acceptance.ranks import Continuation, RankMeter
from vllm_medusa.acceptance.statistics import RANK_CAP, head_accuracy
from vllm_medusa.acceptance.stored_heads import StoredHeads
from vllm_medusa.acceptance.trees import path_probabilities
from vllm_medusa.calibration.check import Checked, check_trees
from vllm_medusa.calibration.choice import Candidate, choose
from vllm_medusa.calibration.dynamic import DynamicFindings, measure_dynamic
from vllm_medusa.calibration.estimates import METHODS, NUM_FOLDS, CrossFit
from vllm_medusa.calibration.findings import Findings, Section
from vllm_medusa.calibration.inputs import Inputs, read_inputs
from vllm_medusa.calibration.report import summary, write_report
from vllm_medusa.calibration.settings import BATCH_SIZES, CalibrateSettings
from vllm_medusa.calibration.texts import continue_requests, tokens_to_generate
from vllm_medusa.draft.probability import PROBABILITIES_FILE
from vllm_medusa.engines.engine import start_engine
from vllm_medusa.engines.process import EngineProcessError
from vllm_medusa.errors import UserError
from vllm_medusa.files import write_bytes
from vllm_medusa.heads.checkpoint import SCHEDULE_FILE, TREE_FILE
from vllm_medusa.heads.selector import Selector
from vllm_medusa.reporting.plots import check_matplotlib
from vllm_medusa.reporting.progress import Bar
from vllm_medusa.reporting.provenance import provenance
from vllm_medusa.stepcost.costs import StepCosts, read_step_costs
from vllm_medusa.stepcost.measure import measure_step_costs, trees_to_measure
from vllm_medusa.target.frozen import load_target
from vllm_medusa.tree.draft_tree import MAX_DRAFT_TOKENS, DraftTree, write_tree_file
from vllm_medusa.tree.schedule import write_schedule_file


def calibrate(settings: CalibrateSettings) -> str:
    """Measure, choose and write; return the text to print.

    Raises:
        UserError: an input cannot be used. Then nothing is written.

    """
    check_matplotlib("train")
    inputs = read_inputs(settings)
    costs = _costs_of_file(settings)
    try:
        findings = _find(settings, inputs, costs)
    except EngineProcessError as error:
        raise UserError(
            f"the engine of vLLM ended ({error.reason}); correct --llm-options"
        ) from None
    _write(findings, inputs.out)
    return summary(findings, inputs.out)


def _costs_of_file(settings: CalibrateSettings) -> StepCosts | None:
    if settings.step_costs is None:
        return None
    costs = read_step_costs(settings.step_costs)
    if costs.max_drafts < max(settings.sizes):
        raise UserError(
            f"--step-costs {settings.step_costs}: the costs go up to {costs.max_drafts} draft "
            f"tokens, but --sizes up to {max(settings.sizes)}; measure larger trees or calibrate "
            "smaller ones"
        )
    return costs


def _find(settings: CalibrateSettings, inputs: Inputs, costs: StepCosts | None) -> Findings:
    continuations = measure_ranks(settings, inputs)
    fit = _fit(settings, continuations)
    sections = _sections(settings, fit, continuations)
    dynamic = _dynamic(fit, continuations, inputs)
    if settings.with_step_costs and costs is None:
        costs = _measure_costs(settings, inputs, fit)
    return Findings(
        settings=settings,
        provenance=provenance(_device_name()),
        num_heads=inputs.num_heads,
        num_prompts=len({item.prompt_id for item in continuations}),
        sections=sections,
        paths=fit.paths,
        probabilities=path_probabilities([item.ranks for item in continuations]),
        dynamic=dynamic,
        checked=_check(settings, inputs, fit),
        costs=costs,
        choice=None if costs is None else choose(_candidates(settings, fit, sections), costs),
    )


def measure_ranks(settings: CalibrateSettings, inputs: Inputs) -> list[Continuation]:
    """Continue the prompts and measure the heads' ranks along the continuations."""
    texts = list(inputs.texts)
    if inputs.requests:
        temperatures = [0.0, *([settings.temperature] if settings.temperature else [])]
        num_tokens = tokens_to_generate(settings.max_tokens, inputs.num_heads)
        with (
            start_engine(inputs.options) as engine,
            Bar("continuations", "prompts", len(temperatures) * len(inputs.requests)) as bar,
        ):
            for temperature in temperatures:
                texts += continue_requests(
                    engine, inputs.requests, num_tokens, temperature, bar.advance
                )
    target = load_target(
        settings.model,
        revision=settings.model_revision,
        dtype=getattr(torch, inputs.options["dtype"]),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    with Bar("ranks", "texts", len(texts)) as bar:
        meter = RankMeter(target, StoredHeads(inputs.checkpoint, target), num_guesses=RANK_CAP)
        continuations = meter.measure(texts, bar.advance)
    del target, meter
    # Free the memory that PyTorch keeps, for the engines that follow.
    torch.cuda.empty_cache()
    return continuations


def _fit(settings: CalibrateSettings, continuations: Sequence[Continuation]) -> CrossFit:
    """Make the trees, if there are enough prompts and paths."""
    num_positions = sum(len(item.ranks) for item in continuations)
    num_prompts = len({item.prompt_id for item in continuations})
    if num_prompts < NUM_FOLDS:
        raise UserError(
            f"--prompts {settings.prompts}: {num_prompts} prompts ({num_positions} positions) are "
            f"too few to check trees on prompts that they were not made from; give at least "
            f"{NUM_FOLDS}, better a hundred"
        )
    fit = CrossFit(continuations, max(settings.sizes), settings.seed)
    found = len(fit.paths["joint"])
    if found < max(settings.sizes):
        raise UserError(
            f"--sizes {max(settings.sizes)}: only {found} paths were ever right at the "
            f"{num_positions} positions of {num_prompts} prompts; give more prompts, a larger "
            "--max-tokens or smaller sizes"
        )
    return fit


def _dynamic(
    fit: CrossFit, continuations: Sequence[Continuation], inputs: Inputs
) -> DynamicFindings:
    selector = None
    if inputs.checkpoint.spec.selector_rank is not None:
        selector = Selector.from_tensors(inputs.checkpoint.tensors, torch.float32)
    tree = DraftTree.from_paths(fit.paths["joint"][:MAX_DRAFT_TOKENS])
    with Bar("dynamic trees", "folds", NUM_FOLDS + 1) as bar:
        return measure_dynamic(continuations, fit.folds, tree, bar.advance, selector)


def _sections(
    settings: CalibrateSettings, fit: CrossFit, continuations: Sequence[Continuation]
) -> list[Section]:
    """Figures with and without looping text; trees are chosen by the first section."""
    kinds = sorted({item.temperature for item in continuations})
    groups = [("all", kinds)] if len(kinds) > 1 else []
    groups += [(_kind(kind), [kind]) for kind in kinds]
    sections = []
    for name, wanted in groups:
        chosen = [item.temperature in wanted for item in continuations]
        for with_loops in (True, False):
            ranks = [
                item.ranks_of(with_loops=with_loops)
                for item, is_chosen in zip(continuations, chosen, strict=True)
                if is_chosen
            ]
            curve = fit.curve(settings.sizes, chosen, with_loops)
            sections.append(Section(name, with_loops, curve, head_accuracy(ranks)))
    return sections


def _kind(temperature: float) -> str:
    return f"temperature {temperature:g}" if temperature else "greedy"


def _candidates(
    settings: CalibrateSettings, fit: CrossFit, sections: Sequence[Section]
) -> list[Candidate]:
    curve = sections[0].curve
    candidates = [Candidate("none", (), 1.0)]
    candidates += [
        Candidate(f"chain of {length}", DraftTree.chain(length).paths, estimate.value)
        for length, estimate in enumerate(curve.chains, start=1)
    ]
    candidates += [
        Candidate(f"tree of {size}", tuple(fit.paths["joint"][:size]), estimate.predicted.value)
        for size, estimate in zip(settings.sizes, curve.methods["joint"], strict=True)
    ]
    return candidates


def _measure_costs(settings: CalibrateSettings, inputs: Inputs, fit: CrossFit) -> StepCosts:
    trees = trees_to_measure(fit.paths["joint"], settings.timed_sizes(), inputs.num_heads)
    at_once = settings.engines_at_once or (1 if torch.cuda.is_available() else len(trees))
    batch_sizes = settings.batch_sizes or BATCH_SIZES
    runs = len(trees) * len(batch_sizes) * (settings.rounds + 1)
    with Bar("step costs", "runs", runs) as bar:
        return measure_step_costs(
            inputs.options,
            inputs.speculative,
            trees,
            inputs.cost_tokens(),
            batch_sizes,
            rounds=settings.rounds,
            engines_at_once=at_once,
            progress=bar.advance,
            provenance=provenance(_device_name()),
        )


def _check(settings: CalibrateSettings, inputs: Inputs, fit: CrossFit) -> list[Checked]:
    trees = [
        (method, size, fit.paths[method][:size])
        for method in METHODS
        for size in settings.check_sizes
    ]
    if not trees:
        return []
    with Bar("check in the engine", "prompts", len(trees) * len(inputs.check_requests)) as bar:
        return check_trees(
            inputs.options,
            inputs.speculative,
            trees,
            inputs.check_requests,
            max_tokens=tokens_to_generate(settings.max_tokens, inputs.num_heads),
            num_heads=inputs.num_heads,
            seed=settings.seed,
            progress=bar.advance,
        )


def _write(findings: Findings, out: Path) -> None:
    """Write all files, or none if one of them cannot be written."""
    schedule = findings.choice.schedule() if findings.choice else None
    with tempfile.TemporaryDirectory() as name:
        staged = Path(name)
        write_report(findings, staged)
        write_tree_file(staged / TREE_FILE, findings.paths["joint"])
        probabilities = json.dumps(findings.dynamic.probabilities.to_dict())
        (staged / PROBABILITIES_FILE).write_text(probabilities + "\n", encoding="utf-8")
        if schedule is not None:
            write_schedule_file(staged / SCHEDULE_FILE, schedule)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}; choose another") from None
        for path in sorted(staged.iterdir()):
            write_bytes(out / path.name, path.read_bytes())
    if schedule is None:
        # An existing one was made for other trees.
        (out / SCHEDULE_FILE).unlink(missing_ok=True)


def _device_name() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
