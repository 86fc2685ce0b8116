"""Statistics, figures, sameness and the comparison of two runs, on made-up measurements."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_medusa.bench.categories import BatchMeasurement, categories_of
from vllm_medusa.bench.compare import compare_runs, is_beyond_spread
from vllm_medusa.bench.engines import VariantState
from vllm_medusa.bench.figures import OFFLINE, figures_of
from vllm_medusa.bench.offline import measurement_of, source_table
from vllm_medusa.bench.plots import plot
from vllm_medusa.bench.prompts import BenchPrompt
from vllm_medusa.bench.report import (
    absence_table,
    category_table,
    depth_table,
    markdown,
    mismatch_table,
    sameness_table,
    speed_table,
)
from vllm_medusa.bench.results import FORMAT, RESULTS, prepare_out, read_results
from vllm_medusa.bench.sameness import Mismatch, Sameness, compare_outputs, first_difference
from vllm_medusa.bench.spread import Spread, ratios, spread
from vllm_medusa.engines.engine import EngineInfo, RequestTimes, Run
from vllm_medusa.engines.process import last_exception
from vllm_medusa.errors import UserError
from vllm_medusa.files import write_json

ROOT = Path(__file__).parents[2]
numbers = st.floats(min_value=0.1, max_value=1e6)


@given(st.lists(numbers, min_size=1))
def test_spread(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    assert found.median == pytest.approx(statistics.median(values))
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert found.values == tuple(values)


def test_spread_of_known_values() -> None:
    found = spread([4, 1, 3, 2, 5])
    assert found is not None
    assert (found.low, found.median, found.high) == (2, 3, 4)
    assert found.format(1) == "3.0 (2.0 to 4.0)"
    one = spread([2.0])
    assert one is not None
    assert one.format(2) == "2.00"
    assert spread([]) is None


def test_ratios_are_of_the_same_round() -> None:
    assert ratios({1: 2.0, 3: 9.0, 4: 1.0}, {1: 1.0, 2: 5.0, 3: 3.0}) == [2.0, 3.0]


def make_run(
    step_ms: list[float], emitted: list[list[int]], by_depth: list[int], drafts: int
) -> Run:
    """A run whose requests got so many tokens a step; tokens are numbered by place."""
    return Run(
        token_ids=[list(range(sum(steps))) for steps in emitted],
        texts=["" for _ in emitted],
        step_ms=step_ms,
        full_steps=(1, len(step_ms)),
        requests=[
            RequestTimes(ttft_ms=step_ms[0], tpot_ms=2.0, emitted=e, has_ended=False)
            for e in emitted
        ],
        num_drafts=drafts,
        num_accepted=sum(by_depth),
        accepted_by_depth=by_depth,
        num_preemptions=0,
        peak_memory_bytes=2**30,
        device_memory_bytes=None,
    )


def test_nodes_by_source() -> None:
    run = make_run([1.0, 1.0], [[1, 2]], [1], 1)
    counted = {"nodes_drafted": 6, "text_nodes": 6, "heads_nodes": 2, "text_accepted": 1}
    runs = [run, dataclasses.replace(run, medusa=counted)]
    measured = [
        measurement_of(name, 1, number, [prompt(0)], each)
        for number in (1, 2)
        for name, each in zip(("baseline", "tree"), runs, strict=True)
    ]
    assert source_table(measured).rows == [("tree", "1", "3.0", "0", "4 / 0", "12 / 2", "0 / 0")]


def prompt(index: int, category: str | None = None) -> BenchPrompt:
    return BenchPrompt(f"p{index}", category, (1, 2), "text")


@pytest.fixture
def measurements() -> list[BatchMeasurement]:
    """Two rounds; the machine is twice as slow in the second, which must not touch ratios."""
    rows = []
    for number, slowness in ((1, 1.0), (2, 2.0)):
        base = make_run([slowness * 10] * 5, [[1] * 5], [], 0)
        tree = make_run([slowness * 10] * 3, [[1, 2, 2]], [2, 0], 2)
        batch = [prompt(number, "code")]
        rows.append(measurement_of("baseline", 1, number, batch, base))
        rows.append(measurement_of("tree", 1, number, batch, tree))
    return rows


def test_figures(measurements: list[BatchMeasurement]) -> None:
    baseline, tree = figures_of(measurements, OFFLINE)
    assert baseline.spreads["speedup"] is None

    def values(name: str, row: Any = tree) -> tuple[float, ...]:
        return tuple(row.spreads[name].values)

    assert values("tokens_per_s", baseline) == (100, 50)
    assert values("speedup") == pytest.approx((5 / 3, 5 / 3))
    assert tree.median("tokens_per_step") == 2.0
    assert tree.median("num_steps") == 3
    assert values("step_ms") == (10, 20)
    assert tree.acceptance_by_depth == (1.0,)  # trailing zeros are the number of drafts, not depth
    assert baseline.acceptance_by_depth == ()
    assert tree.totals == {"num_preemptions": 0}
    assert tree.peaks == {"peak_memory_bytes": 2**30, "device_memory_bytes": None}


def test_quartiles_are_of_all_steps_and_requests() -> None:
    """Of a batch of two, in two rounds: quartiles of four requests, each round's median."""
    rounds = [
        dataclasses.replace(
            make_run([1.0, 1.0], [[1, 1], [1, 1]], [], 0),
            requests=[RequestTimes(t, None, emitted=[1, 1], has_ended=False) for t in times],
        )
        for times in ((1.0, 3.0), (5.0, 7.0))
    ]
    (row,) = figures_of(
        [measurement_of("baseline", 2, n, [prompt(0)] * 2, run) for n, run in enumerate(rounds, 1)],
        OFFLINE,
    )
    assert row.spreads["ttft_ms"] == Spread(4.0, 2.5, 5.5, (2.0, 6.0))
    assert row.spreads["tpot_ms"] is None


def test_figures_as_json(measurements: list[BatchMeasurement]) -> None:
    written = json.loads(json.dumps(figures_of(measurements, OFFLINE)[0].to_json(OFFLINE)))
    assert list(written) == [
        *("variant", "batch_size", "tokens_per_s", "speedup", "tokens_per_step", "num_steps"),
        *("step_ms", "ttft_ms", "tpot_ms", "acceptance_by_depth", "num_preemptions"),
        *("peak_memory_bytes", "device_memory_bytes"),
    ]
    assert written["speedup"] is None
    assert written["batch_size"] == 1
    assert set(written["step_ms"]) == {"median", "low", "high", "values"}


def test_tokens_per_step_counts_steps_without_drafts() -> None:
    run = make_run([1.0] * 4, [[1, 1, 1, 4]], [1, 1, 1], drafts=1)
    assert run.tokens_per_step == 2.0


def test_decode_steps_are_those_of_the_whole_batch() -> None:
    run = make_run([9.0, 1.0, 1.0], [[1, 1, 1]], [], 0)
    assert run.decode_step_ms == [1.0, 1.0]


def test_categories(measurements: list[BatchMeasurement]) -> None:
    (tree,) = categories_of(measurements)
    assert (tree.variant, tree.category, tree.num_requests) == ("tree", "code", 2)
    assert tree.tokens_per_step is not None
    assert tree.tokens_per_step.values == (2.0, 2.0)
    assert tree.speedup is not None
    assert tree.speedup.values == (1.0, 1.0)  # the made-up times per token are equal


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_first_difference(one: list[int], other: list[int]) -> None:
    found = first_difference(one, other)
    if one == other:
        assert found is None
        return
    assert found is not None
    position, ours, theirs = found
    assert one[:position] == other[:position]
    assert ours == (one[position] if position < len(one) else None)
    assert theirs == (other[position] if position < len(other) else None)
    assert ours != theirs


def test_outputs_are_compared_by_place() -> None:
    baseline = {(1, 1, 0): [1, 2, 3], (2, 1, 0): [1], (2, 1, 1): [4, 5]}
    outputs = {(1, 1, 0): [1, 2, 3], (2, 1, 1): [4, 6], (2, 2, 0): [9]}
    found = compare_outputs("v", baseline, outputs, lambda *key: f"prompt {key}")
    assert found.num_compared == 2
    (mismatch,) = found.mismatches
    assert (mismatch.position, mismatch.baseline_token, mismatch.variant_token) == (1, 5, 6)
    assert mismatch.prompt_id == "prompt (2, 1, 1)"


@pytest.mark.parametrize(
    ("dtype", "logprobs", "is_tie"),
    [
        ("bfloat16", (-1.0, -1.125), True),
        ("bfloat16", (-1.0, -1.5), False),
        ("float32", (-1.0, -1.125), False),
        ("float32", (-1.0, -1.0005), True),
        ("bfloat16", (None, None), False),
    ],
)
def test_near_ties(dtype: str, logprobs: tuple[Any, Any], is_tie: bool) -> None:
    assert mismatch(*logprobs).is_near_tie(dtype) == is_tie


def mismatch(ours: float | None, theirs: float | None) -> Mismatch:
    return Mismatch(
        variant="v",
        batch_size=1,
        round=1,
        prompt_id="p",
        position=3,
        baseline_token=7,
        variant_token=None,
        baseline_logprob=ours,
        variant_logprob=theirs,
    )


def test_report_says_it_all(tmp_path: Path, measurements: list[BatchMeasurement]) -> None:
    states = {
        "baseline": VariantState(starts=[EngineInfo(2.0, "cpu", None, 1, 1)]),
        "tree": VariantState(starts=[EngineInfo(3.0, "cpu", None, 1, 1)], failed="ValueError: no"),
        "eagle": VariantState(unavailable="no such file or directory: x"),
    }
    figures = figures_of(measurements, OFFLINE)
    sameness = [Sameness(variant="tree", num_compared=2, mismatches=(mismatch(-1.0, -9.0),))]
    tables = [
        speed_table(figures, states, OFFLINE),
        absence_table(states),
        depth_table(figures),
        category_table(categories_of(measurements)),
        sameness_table(sameness, "float32"),
        mismatch_table(sameness, "float32"),
    ]
    plots = plot(tmp_path, figures, OFFLINE)
    assert len(plots) == 3
    for name, _ in plots:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    machine = {"cpu": "C", "cores": 2, "cpu_flags": ["avx2"], "device": None}
    provenance = {
        "machine": machine,
        "versions": {"vllm": "1", "torch": "2", "vllm_medusa": "3"},
        "command": "vllm-medusa bench",
        "time": "now",
        "git_revision": "abc",
    }
    text = markdown(tables, ["A note."], plots, provenance, {"model": "M"})
    for part in (
        "| eagle | unavailable | no such file or directory: x |",
        "| tree | broke off | ValueError: no |",
        "1.67 (1.67 to 1.67)",
        "| tree | 2 | 1 | 0 | 1 |",
        "| tree | batch 1 | 1.00 |",
        "| v | 1 | 1 | p | 3 | 7 | end | -1.0000 -9.0000 | not a tie |",
        "| code | tree |",
        "- A note.",
        "revision abc",
        "![Acceptance by depth](acceptance_by_depth.png)",
    ):
        assert part in text, part


def run_file(path: Path, tokens_per_s: list[float], **changed: Any) -> Path:
    path.mkdir()
    figure = {
        "variant": "tree",
        "batch_size": 1,
        "tokens_per_s": dataclasses.asdict(spread(tokens_per_s)),
    }
    results = {
        "mode": "offline",
        "provenance": {"versions": {"vllm": "0.32.0"}, "machine": {"cpu": "C"}},
        "settings": {"model": "M", "dtype": "float32"},
        "figures": [figure],
        "sameness": [],
    }
    write_json(path / RESULTS, {"format": FORMAT, **results, **changed})
    return path / RESULTS


def test_compare_marks_changes_beyond_the_spread(tmp_path: Path) -> None:
    first = run_file(tmp_path / "a", [100, 101, 102])
    alike = run_file(tmp_path / "b", [100.5, 101, 103])
    faster = run_file(tmp_path / "c", [150, 151, 152], settings={"model": "M", "dtype": "bfloat16"})
    text = compare_runs(first, alike)
    assert "1.000" in text
    assert "0 of 1 figures changed" in text
    text = compare_runs(first, faster.parent)
    assert "1.495" in text
    assert "1 of 1 figures changed" in text
    assert "different setting: dtype was 'float32', is 'bfloat16'" in text


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "benchmarks").glob("*/results.json")))
def test_published_results_can_be_compared(path: Path) -> None:
    text = compare_runs(path, path.parent)
    assert "0 of " in text
    assert int(text.rpartition("0 of ")[2].split()[0]) > 20
    assert "different" not in text


def test_beyond_spread() -> None:
    def found(low: float, median: float, high: float) -> Spread:
        return Spread(median, low, high, (low, high))

    assert not is_beyond_spread(found(1, 2, 3), found(2, 3, 4))
    assert not is_beyond_spread(found(1, 2, 9), found(5, 6, 7))
    assert is_beyond_spread(found(1, 2, 3), found(3.5, 4, 5))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}'])
def test_no_results_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="give"):
        read_results(path)
    with pytest.raises(UserError, match="No such file"):
        read_results(tmp_path / "none.json")


def test_results_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    prepare_out(tmp_path, overwrite=False)
    run_file(tmp_path / "a", [1.0])
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / "speedup_by_batch.png").touch()
    with pytest.raises(UserError, match="holds the results of a run"):
        prepare_out(tmp_path / "a", overwrite=False)
    assert (tmp_path / "a" / "results.json").exists()
    prepare_out(tmp_path / "a", overwrite=True)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="name another directory"):
        prepare_out(tmp_path / "file" / "out", overwrite=False)


def test_compare_needs_runs_of_one_mode(tmp_path: Path) -> None:
    first = run_file(tmp_path / "a", [1.0])
    other = run_file(tmp_path / "b", [1.0], mode="online")
    assert json.loads(other.read_text())["format"] == FORMAT
    with pytest.raises(UserError, match="one mode"):
        compare_runs(first, other)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("Traceback\nValueError: a\nINFO b\n", "ValueError: a"),
        ("ValueError: a\nRuntimeError: b", "RuntimeError: b"),
        (
            "(EngineCore pid=1) ERROR 11-21 03:00:00 [core.py:1] torch.OutOfMemoryError: full\nbye",
            "torch.OutOfMemoryError: full",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for X\n"
            "  Value error, bad [type=v]\n    For more",
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for X "
            "Value error, bad [type=v]",
        ),
        ("INFO a\nvllm_medusa: error: heads 'x': none\n", "heads 'x': none"),
        ("killed\n", "killed"),
        ("", "it ended without a message"),
    ],
)
def test_reason_of_a_log(log: str, reason: str) -> None:
    assert last_exception(log) == reason


def test_ratios_do_not_see_a_drifting_machine() -> None:
    """A variant 1.5 times as fast, on a machine whose speed changes fourfold between rounds."""
    rng = random.Random(0)
    speed = {number: rng.uniform(1, 4) for number in range(9)}
    faster = {number: 1.5 * value for number, value in speed.items()}
    assert ratios(faster, speed) == pytest.approx([1.5] * 9)
