"""`vllm-medusa calibrate` on the demo model: from prompts to trees, checked against the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from tests.integration.command_line import DEMO_HEADS, DEMO_MODEL, MEDUSA_HEADS, REPO
from tests.integration.conftest import open_engine
from tests.integration.sequential_heads import write_native_hydra
from vllm_medusa.acceptance.ranks import RankMeter
from vllm_medusa.acceptance.statistics import accepted_drafts
from vllm_medusa.acceptance.stored_heads import StoredHeads
from vllm_medusa.acceptance.trees import best_paths
from vllm_medusa.calibration.texts import Request, continue_requests
from vllm_medusa.cli import main as cli
from vllm_medusa.data.rows import Row, write_shard
from vllm_medusa.draft.probability import PROBABILITIES_FILE
from vllm_medusa.engines.engine import EngineProcess
from vllm_medusa.heads import load_heads
from vllm_medusa.stepcost.costs import StepCost, StepCosts
from vllm_medusa.target.frozen import load_target
from vllm_medusa.tree.schedule import read_schedule_file

PROMPTS = (REPO / "demo" / "prompts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
ENGINE = {"max_model_len": 1024, "enforce_eager": True, "block_size": 32}


def write_prompts(path: Path, start: int, stop: int) -> Path:
    path.write_text("".join(PROMPTS[start:stop]), encoding="utf-8")
    return path


def write_costs(path: Path) -> Path:
    """A machine on which 8 drafts are cheap for one request, 4 for a few, none for many."""
    table = {1: (16, 10.4, 10.8), 4: (16, 10.5, 30), 32: (40, 50, 60)}
    rows = [
        StepCost(batch_size, drafts, leaves, (time,))
        for batch_size, (chain, small, large) in table.items()
        for drafts, leaves, time in ((0, 0, 10), (4, 1, chain), (4, 2, small), (8, 4, large))
    ]
    path.write_text(json.dumps(StepCosts(rows, {}).to_dict()), encoding="utf-8")
    return path


#: What `distill` says of rows that it sampled.
SAMPLED = json.dumps({"num_shards": 1, "made_from": {"temperature": 0.8}})


def write_rows(directory: Path, count: int, longest: int = 1000) -> Path:
    """Rows as distill makes them, of two answers each: pieces of the demo's prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    rows = []
    for index, line in enumerate(PROMPTS[:count]):
        tokens = tokenizer(json.loads(line)["prompt"])["input_ids"][:longest]
        is_answer = np.arange(len(tokens)) >= 8
        is_answer[30:36] = False  # the user's second turn
        rows.append(Row(f"row {index}", np.array(tokens, np.int32), is_answer))
    directory.mkdir()
    write_shard(directory / "part-00000.parquet", rows)
    return directory


def calibrate(*arguments: Any, heads: Path = MEDUSA_HEADS, model: Path = DEMO_MODEL) -> int:
    options = [
        *("--model", model, "--dtype", "float32", "--sizes", "4,8"),
        *("--llm-options", json.dumps(ENGINE)),
    ]
    return cli.main(["calibrate", str(heads), *map(str, [*options, *arguments])])


def curves_in_engine(heads: Path) -> dict[str, Any]:
    """The curves that an engine starts to draft with."""
    spec = {"method": "medusa", "model": str(heads), "tree": "dynamic", "measure_costs": False}
    with open_engine(DEMO_MODEL, speculative_config=spec) as llm:
        (drafter,) = llm.collective_rpc(lambda worker: worker.model_runner.tree_drafter._drafter)
        (text,) = drafter._proposers
        curves = {"heads": drafter._heads._curve, "text": text._continuations._curve}
        return {name: curve.to_dict() for name, curve in curves.items()}


@pytest.mark.engine
def test_rows_to_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers that there are already, and step costs measured before; then an engine with it."""
    heads = Path(shutil.copytree(DEMO_HEADS, tmp_path / "heads"))
    (heads / "medusa_tree.json").unlink()
    demo_curves = json.loads((heads / PROBABILITIES_FILE).read_text())["curves"]
    costs = write_costs(tmp_path / "costs.json")
    rows = write_rows(tmp_path / "rows", 20)
    assert calibrate("--prompts", rows, "--step-costs", costs, heads=heads) == 0
    schedule = read_schedule_file(heads / "medusa_tree_schedule.json")
    assert [(e.max_batch_size, len(e.paths)) for e in schedule.entries] == [
        (1, 8),
        (4, 4),
        (None, 0),
    ]
    loaded = load_heads(heads)
    assert loaded.tree_paths is not None
    assert len(loaded.tree_paths) == 8
    assert set(schedule.entries[1].paths) == {tuple(path) for path in loaded.tree_paths[:4]}
    report = json.loads((heads / "calibration.json").read_text())
    assert report["num_prompts"] == 20
    # Two answers in each row; their last positions' tokens are not all known.
    assert report["sections"][0]["num_continuations"] == 40
    assert (heads / "calibration-speedup.png").exists()
    assert "tree of 8" in capsys.readouterr().out

    # Again without step costs: a schedule of other trees must not stay. And as rows that were
    # sampled: the report says so.
    (rows / "distill.json").write_text(SAMPLED)
    assert calibrate("--prompts", rows, "--no-step-costs", heads=heads) == 0
    assert not (heads / "medusa_tree_schedule.json").exists()
    assert (heads / "medusa_tree.json").exists()
    sections = json.loads((heads / "calibration.json").read_text())["sections"]
    assert {section["text"] for section in sections} == {"temperature 0.8"}
    written = json.loads((heads / PROBABILITIES_FILE).read_text())["curves"]
    used = curves_in_engine(heads)
    assert used == {name: written[name] for name in used}
    assert all(used[name] != demo_curves[name] for name in used)


def test_heads_that_run_in_turn(tmp_path: Path) -> None:
    """They get trees and probabilities, which the engine reads, by the paths of their tree."""
    rows, heads = write_rows(tmp_path / "rows", 12), write_native_hydra(tmp_path / "heads")
    (heads / "medusa_tree.json").unlink()
    assert calibrate("--prompts", rows, "--no-step-costs", heads=heads) == 0
    assert len(load_heads(heads).tree_paths or ()) == 8
    written = json.loads((heads / PROBABILITIES_FILE).read_text())["curves"]
    used = curves_in_engine(heads)
    assert used == {name: written[name] for name in used}


@pytest.mark.engine
def test_prompts_to_trees(tmp_path: Path) -> None:
    """Continuations by the engine, greedy and sampled."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 0, 10)
    options = ["--prompts", prompts, "--max-tokens", 24, "--temperature", 0.8, "--out", tmp_path]
    assert calibrate(*options, "--no-step-costs") == 0
    report = json.loads((tmp_path / "calibration.json").read_text())
    sections = {(s["text"], s["with_loops"]): s for s in report["sections"]}
    assert set(sections) == {
        (text, loops) for text in ("all", "greedy", "temperature 0.8") for loops in (True, False)
    }
    # Steps begin at 23 positions of a text that goes on.
    assert sections["greedy", True]["num_positions"] == 10 * 23
    assert sections["greedy", True]["num_continuations"] == 10
    assert sections["all", True]["num_continuations"] == 20
    assert (tmp_path / "medusa_tree.json").exists()


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_simulated_steps_are_the_engines(tmp_path: Path, kind: str) -> None:
    """Prompt by prompt, step by step: float32, where both see the same numbers."""
    options = {"model": str(DEMO_MODEL), "dtype": "float32", "seed": 0, **ENGINE}
    options["kv_cache_memory_bytes"] = 2**28
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in PROMPTS[:24]]
    requests = [Request(str(index), tokens) for index, tokens in enumerate(prompts)]
    heads = MEDUSA_HEADS if kind == "medusa" else write_native_hydra(tmp_path / "heads")
    checkpoint = load_heads(heads)
    max_tokens = 68
    with EngineProcess(options) as engine:
        engine.wait()
        texts = continue_requests(engine, requests, max_tokens, 0.0, lambda _: None)
    target = load_target(str(DEMO_MODEL), revision=None, dtype=torch.float32)
    meter = RankMeter(target, StoredHeads(checkpoint, target))
    continuations = meter.measure(texts, lambda _: None)
    paths = best_paths([item.ranks for item in continuations], 16)
    tree = [list(path) for path in paths]
    speculative = {"method": "medusa", "model": str(heads), "tree": tree}
    with EngineProcess({**options, "speculative_config": speculative}) as engine:
        engine.wait()
        run = engine.run(prompts, max_tokens)
    for item, times in zip(continuations, run.requests, strict=True):
        simulated, position = [], 0
        emitted = 1 + accepted_drafts(item.ranks, paths)
        while position < len(item.ranks):
            simulated.append(int(emitted[position]))
            position += simulated[-1]
        assert times.emitted[1 : 1 + len(simulated)] == simulated


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_prediction_is_what_the_engine_measures(tmp_path: Path) -> None:
    """Within what the prompts' own spread allows; step costs measured as well."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 0, 24)
    others = write_prompts(tmp_path / "others.jsonl", 24, 48)
    out = tmp_path / "out"
    options = ["--prompts", prompts, "--check-prompts", others, "--check", "8", "--out", out]
    assert calibrate(*options, "--batch-sizes", "1,2", "--rounds", 2, "--max-tokens", 96) == 0
    report = json.loads((out / "calibration.json").read_text())
    assert {(c["method"], c["size"]) for c in report["checked"]} == {("joint", 8), ("product", 8)}
    for checked in report["checked"]:
        measured, predicted = checked["with_loops"], checked["predicted_with_loops"]
        assert measured["low"] < predicted["high"]
        assert predicted["low"] < measured["high"]
        assert abs(predicted["value"] / measured["value"] - 1) < 0.15
    rows = report["step_costs"]["rows"]
    assert {(row["batch_size"], row["num_drafts"]) for row in rows} == {
        (batch_size, drafts) for batch_size in (1, 2) for drafts in (0, 4, 8)
    }
    assert all(time > 0 for row in rows for time in row["round_ms"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.jsonl"], "none.jsonl"),
        (["--prompts", "{prompts}", "--check", "8"], "--check and --check-prompts"),
        (["--prompts", "{prompts}", "--sizes", "4,200"], "--sizes 200: a tree has 1 to 127"),
        (["--prompts", "{prompts}", "--cost-sizes", "4"], "must hold 8"),
        (["--prompts", "{prompts}", "--step-costs", "none.json"], "none.json"),
        (["--prompts", "{prompts}", "--max-tokens", "900"], "shorten it, leave it out or lower"),
        (["--prompts", "{prompts}", "--llm-options", '{"dtype": "x"}'], "is set by --dtype"),
        (
            ["--prompts", "{prompts}", "--check", "8", "--check-prompts", "{prompts}"],
            "is among --prompts too",
        ),
        (["--prompts", "{rows}", "--no-step-costs"], "4 prompts (416 positions) are too few"),
        (["--prompts", "{rows}", "--temperature", "1"], "leave the temperature out"),
        (
            ["--prompts", "{sampled}", "--check", "8", "--check-prompts", "{prompts}"],
            "were sampled at temperature 0.8; give greedy rows",
        ),
        (["--prompts", "{prompts}", "--no-step-costs", "--batch-sizes", "1"], "leave it out"),
        (["--prompts", "{prompts}", "--step-costs", "{costs}", "--sizes", "16"], "go up to 8"),
        (["--prompts", "{prompts}", "--out", "{prompts}/deep"], "no directory to write to"),
        (["--prompts", "{rows}", "--max-prompts", "0"], "--max-prompts 0: must be above 0"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    places = {
        "prompts": write_prompts(tmp_path / "prompts.jsonl", 0, 4),
        "rows": write_rows(tmp_path / "rows", 4),
        "sampled": write_rows(tmp_path / "sampled", 4),
        "costs": write_costs(tmp_path / "costs.json"),
    }
    (places["sampled"] / "distill.json").write_text(SAMPLED)
    given = [
        text.format(**places) if text[0] == "{" and text[1] != '"' else text for text in arguments
    ]
    out = tmp_path / "out"
    assert calibrate("--out", out, *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vllm-medusa calibrate: error: ")
    assert message in error
    assert not out.exists()


def test_too_few_positions_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows", 6, longest=20)
    options = ["--no-step-costs", "--sizes", "127", "--out", tmp_path]
    assert calibrate("--prompts", rows, *options) == 2
    assert "paths were ever right at the" in capsys.readouterr().err
    assert not (tmp_path / "calibration.json").exists()


def test_heads_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heads = tiny.make_heads(tmp_path / "heads")
    prompts = write_prompts(tmp_path / "prompts.jsonl", 0, 4)
    assert calibrate("--prompts", prompts, heads=heads) == 2
    assert "the target model has 256" in capsys.readouterr().err
