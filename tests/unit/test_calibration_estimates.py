"""Cross-fitted estimates, and the report that is made of them, on texts made up here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_medusa.acceptance.intervals import Estimate, ratio, resample
from vllm_medusa.acceptance.ranks import Continuation
from vllm_medusa.acceptance.statistics import RANK_CAP, head_accuracy, simulate
from vllm_medusa.acceptance.trees import path_probabilities, product_paths, step_paths
from vllm_medusa.calibration.check import Checked, steps_of
from vllm_medusa.calibration.choice import Candidate, choose
from vllm_medusa.calibration.dynamic import Accepted, Bin, DynamicFindings
from vllm_medusa.calibration.estimates import CrossFit
from vllm_medusa.calibration.report import Findings, Section, summary, write_report
from vllm_medusa.calibration.settings import CalibrateSettings
from vllm_medusa.draft.probability import Probabilities
from vllm_medusa.engines.engine import RequestTimes
from vllm_medusa.stepcost.costs import StepCost, StepCosts

NUM_HEADS = 3
SIZES = (4, 8, 16)


def made_up(num_prompts: int, seed: int, positions: int = 60) -> list[Continuation]:
    """Ranks that depend on each other: an easy position is easy for all heads."""
    rng = np.random.default_rng(seed)
    result = []
    for prompt in range(num_prompts):
        ease = rng.beta(1.2, 1.2, size=(positions, 1))
        ranks = rng.geometric(np.clip(0.15 + 0.8 * ease, 0, 1), size=(positions, NUM_HEADS)) - 1
        ranks = np.minimum(ranks, RANK_CAP).astype(np.int16)
        result.append(Continuation(f"p{prompt}", 0.0, ranks, positions // 2))
    return result


@pytest.fixture(scope="module")
def fit() -> CrossFit:
    return CrossFit(made_up(60, 1), max(SIZES), seed=0)


def test_prediction_holds_on_other_prompts_where_in_sample_flatters() -> None:
    """Few texts, large trees: the in-sample figure is too good, the cross-fitted one is not."""
    flattery, errors = [], []
    fresh = [item.ranks for item in made_up(400, 99)]
    for seed in range(5):
        fit = CrossFit(made_up(10, seed, positions=30), 64, seed=0)
        (estimate,) = fit.curve([64], [True] * 10, with_loops=True).methods["joint"]
        truth = simulate(fresh, fit.paths["joint"][:64])
        flattery.append(estimate.in_sample - truth)
        errors.append(estimate.predicted.value - truth)
    assert np.mean(flattery) > 0.1
    assert abs(np.mean(errors)) < 0.6 * np.mean(flattery)


def test_figures_are_those_of_the_path_functions(fit: CrossFit) -> None:
    items = made_up(60, 1)
    ranks = [item.ranks for item in items]
    curve = fit.curve(SIZES, [True] * 60, with_loops=True)
    assert curve.num_positions == 60 * 60
    for size, joint, product, gain in zip(
        SIZES, curve.methods["joint"], curve.methods["product"], curve.gain, strict=True
    ):
        assert joint.in_sample == simulate(ranks, step_paths(ranks, 16)[:size])
        assert product.in_sample == simulate(ranks, product_paths(ranks, size))
        assert joint.predicted.low < joint.predicted.value < joint.predicted.high
        assert gain.value == pytest.approx(joint.predicted.value - product.predicted.value)
    assert curve.chains[1].value == simulate(ranks, [(0,), (0, 0)])


def test_only_chosen_text_before_loops_is_scored(fit: CrossFit) -> None:
    chosen = [index < 20 for index in range(60)]
    curve = fit.curve(SIZES, chosen, with_loops=False)
    assert (curve.num_positions, curve.num_continuations) == (20 * 30, 20)
    ranks = [item.ranks[:30] for item in made_up(60, 1)[:20]]
    assert curve.chains[0].value == simulate(ranks, [(0,)])


def test_interval_covers_the_truth() -> None:
    """A 95 % interval over prompts, of texts that differ from each other."""
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(200):
        lengths = rng.choice([1.2, 2.8], size=40)  # tokens per step of each prompt; 2 on average
        estimate = ratio(np.stack([lengths * 50, np.full(40, 50)], axis=1), resample(40, seed))
        covered += estimate.low <= 2 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_steps_of_a_run() -> None:
    # The first was cut at 12 tokens, the second ended by itself; the third repeats a token from its
    # fourth on.
    run = SimpleNamespace(
        token_ids=[list(range(12)), list(range(12)), [1, 2, 3, *[7] * 37]],
        requests=[
            RequestTimes(0.0, None, [1, 3, 1, 2, 3, 2], has_ended=False),
            RequestTimes(0.0, None, [1, 3, 1, 2, 3, 2], has_ended=True),
            RequestTimes(0.0, None, [1, 1, *[3] * 12, 2], has_ended=False),
        ],
    )
    # Steps begin at 0, 3, 4, 6, 9. With 2 heads those before 9 count if the text was cut, so not
    # the last. The third loops from token 4 on (its run of 7s begins at 3 and repeats at 4), so
    # that only the steps that begin at 0 lie before it.
    assert steps_of(run, num_heads=2) == [  # type: ignore[arg-type]
        [[9, 4], [9, 4]],
        [[11, 5], [11, 5]],
        [[37, 13], [1, 1]],
    ]


def findings_of(fit: CrossFit, with_costs: bool) -> Findings:
    items = made_up(60, 1)
    settings = CalibrateSettings(heads="heads", model="model", prompts=Path("p.jsonl"), sizes=SIZES)
    sections = [
        Section(
            "greedy",
            with_loops,
            fit.curve(SIZES, [True] * 60, with_loops),
            head_accuracy([item.ranks for item in items]),
        )
        for with_loops in (True, False)
    ]
    costs = choice = None
    if with_costs:
        rows = [
            StepCost(batch_size, drafts, leaves, (time, time * 1.1))
            for batch_size in (1, 8)
            for drafts, leaves, time in ((0, 0, 10.0), (3, 1, 10.5), (4, 2, 11.0), (16, 9, 13.0))
        ]
        costs = StepCosts(rows, {})
        tree = tuple(fit.paths["joint"][:16])
        lengths = [e.value for e in sections[0].curve.chains]
        trees = [e.predicted.value for e in sections[0].curve.methods["joint"]]
        names = [(f"chain of {n + 1}", tuple((0,) * d for d in range(1, n + 2))) for n in range(3)]
        names += [(f"tree of {size}", tree[:size]) for size in SIZES]
        candidates = [Candidate("none", (), 1.0)] + [
            Candidate(name, paths, length)
            for (name, paths), length in zip(names, [*lengths, *trees], strict=True)
        ]
        choice = choose(candidates, costs)
    return Findings(
        settings=settings,
        provenance={},
        num_heads=NUM_HEADS,
        num_prompts=60,
        sections=sections,
        paths=fit.paths,
        probabilities=path_probabilities([item.ranks for item in items]),
        dynamic=DynamicFindings(
            Probabilities.default(NUM_HEADS, 4),
            {"heads": [Bin(10, 0.25, 0.3)], "text": [Bin(5, 0.75, 0.6)]},
            [Accepted(8, 3.21, 2.34)],
        ),
        checked=[Checked("joint", 8, Estimate(2.0, 1.9, 2.1), Estimate(1.9, 1.8, 2.0))],
        costs=costs,
        choice=choice,
    )


def test_report_says_all(fit: CrossFit, tmp_path: Path) -> None:
    findings = findings_of(fit, with_costs=True)
    write_report(findings, tmp_path)
    data = json.loads((tmp_path / "calibration.json").read_text())
    assert data["choice"]["batch_sizes"]["1"]["chosen"] == "tree of 16"
    assert len(data["paths"]["joint"]) == len(data["probabilities"]) == 16
    assert data["checked"][0]["with_loops"]["value"] == 2.0
    page = (tmp_path / "calibration.md").read_text()
    assert "| 8 | 3.21 | " in page
    assert data["dynamic"]["reliability"]["text"] == [
        {"count": 5, "predicted": 0.75, "observed": 0.6}
    ]
    for name in ("acceptance", "tree", "reliability", "speedup"):
        assert (tmp_path / f"calibration-{name}.png").stat().st_size > 5000
        assert f"(calibration-{name}.png)" in page
    for text in ("without looping text", "product, predicted", "tree of 16 (", "joint of 8"):
        assert text in page
    assert "tree of 16" in summary(findings, tmp_path)


def test_report_without_costs(fit: CrossFit, tmp_path: Path) -> None:
    findings = findings_of(fit, with_costs=False)
    write_report(findings, tmp_path)
    assert not (tmp_path / "calibration-speedup.png").exists()
    assert "No step costs" in summary(findings, tmp_path)
