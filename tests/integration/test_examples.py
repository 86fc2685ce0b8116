"""Every script and configuration under `examples/` runs as its documentation says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from tests.integration.command_line import REPO
from vllm_medusa.bench.settings import settings_from
from vllm_medusa.bench.variants import VLLM_CHAIN, missing_requirement
from vllm_medusa.data.rows import Row, write_shard

pytestmark = pytest.mark.engine

CONFIGS = ["bench_ab.yaml", "bench_online.yaml"]
#: Less work, the same path through the program.
EAGER = json.dumps({"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 2**27})
QUICKER = ["--model", "demo/model", "--dtype", "float32", "--llm-options", EAGER]
QUICKER += ["--rounds", "1", "--max-tokens", "8"]
HAS_OWN_MEDUSA = version("vllm").startswith("0.32.")


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, f"examples/{script}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def left_out(config: str, out: Path, *arguments: str) -> set[str]:
    """Run a comparison; return the variants that did not run to the end."""
    command = ["vllm-medusa", "bench", "--config", f"examples/{config}", "--out", str(out)]
    command[0] = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run(
        [*command, *QUICKER, *arguments], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    variants: list[dict[str, Any]] = json.loads((out / "results.json").read_text())["variants"]
    return {v["name"] for v in variants if v["failed"] or v["unavailable"]}


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_name_what_is_there(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    settings = settings_from({}, REPO / "examples" / config)
    variants = settings.parsed_variants()
    assert {variant.name for variant in variants} >= {"baseline", "tree-4", VLLM_CHAIN, "eagle"}
    assert [missing_requirement(variant, "0.32.0") for variant in variants] == [None] * len(
        variants
    )
    assert Path(settings.prompts).exists()


def test_inflated_model_is_as_large_as_asked_and_the_same(tmp_path: Path) -> None:
    printed = run("inflate.py", "demo/model", tmp_path / "inflated", "--parameters", "30e6")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "inflated")
    assert abs(model.num_parameters() / 30e6 - 1) < 0.05
    assert float(printed.rpartition("differ by")[2].split()[0]) < 1e-4


@pytest.mark.slow
def test_offline_comparison(tmp_path: Path) -> None:
    sizes = ["--batch-sizes", "1", "--min-prompts", "1"]
    expected = set() if HAS_OWN_MEDUSA else {VLLM_CHAIN}
    assert left_out("bench_ab.yaml", tmp_path / "results", *sizes) == expected


@pytest.mark.slow
def test_online_comparison(tmp_path: Path) -> None:
    load = ["--request-rates", "inf", "--num-requests", "2"]
    expected = set() if HAS_OWN_MEDUSA else {VLLM_CHAIN}
    assert left_out("bench_online.yaml", tmp_path / "results", *load) == expected


@pytest.mark.slow
@pytest.mark.skipif(not HAS_OWN_MEDUSA, reason="vLLM 0.33 has no Medusa of its own")
def test_step_benchmark(tmp_path: Path) -> None:
    few = ["--batch-sizes", 1, "--rounds", 1, "--max-tokens", 8]
    printed = run("bench_steps.py", *few, "--json", tmp_path / "steps.json")
    assert "(a) step time" in printed
    assert json.loads((tmp_path / "steps.json").read_text())


@pytest.mark.slow
def test_heads_loading_benchmark(tmp_path: Path) -> None:
    few = ["--num-heads", 2, "--hidden-size", 64, "--vocab-size", 512, "--folder", tmp_path]
    rows = run("bench_heads_loading.py", *few).splitlines()[-4:]
    names = [row.split("  ")[0] for row in rows]
    assert names == ["front end", "rank 0 of 1", "rank 0 of 2", "rank 1 of 2"]
    for row in rows:
        before, peak = re.findall(r"([\d,]+) MiB", row)
        assert 0 < int(before.replace(",", "")) <= int(peak.replace(",", ""))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_proposals_benchmark() -> None:
    heads = ["demo/medusa-heads", "demo/heads"]
    rows = run("bench_proposals.py", *heads, "--rounds", 1).splitlines()[-4:]
    assert [row.split()[:2] for row in rows] == [[name, size] for size in "18" for name in heads]
    assert all(float(row.split()[2]) > 0 for row in rows)


@pytest.mark.slow
def test_training_benchmark(tmp_path: Path) -> None:
    few = ["--millions", "--rounds", 1, "--batch-tokens", 512]
    run("bench_training.py", *few, "--out", tmp_path / "training.json")
    assert json.loads((tmp_path / "training.json").read_text())["steps"]


@pytest.mark.slow
def test_comparing_trainings(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count, temperature in (("data", 24, 0.0), ("greedy", 6, 0.0), ("sampled", 6, 0.8)):
        answers = np.arange(40) >= 8
        rows = [
            Row(f"{i}", rng.integers(9, 99, 40).astype(np.int32), answers) for i in range(count)
        ]
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "part-00000.jsonl", rows)
        made = {"num_shards": 1, "made_from": {"temperature": temperature}}
        (tmp_path / name / "distill.json").write_text(json.dumps(made))
    out = tmp_path / "out"
    command = ["--data", tmp_path / "data", "--out", out, "--steps", 3, "--seeds", 0, 1]
    command += ["--test-data", tmp_path / "greedy", tmp_path / "sampled"]
    command += ["--common", "--batch-tokens 512 --dtype float32 --held-out 0.2"]
    command += ["--variant", "plain=", "--variant", "all=--root-aware --selector"]
    printed = run("compare_training.py", *command)
    assert "temperature 0.8, without looping text" in printed
    results = json.loads((out / "results.json").read_text())
    lengths = {}
    for variant in results["variants"]:
        assert [each["seed"] for each in variant["runs"]] == [0, 1]
        for each in variant["runs"]:
            lengths[variant["name"], each["seed"]] = each["tested"][0]["with_loops"]
    mean = sum(lengths["all", s]["acceptance_length"]["chain of 4"] for s in (0, 1)) / 2
    assert re.search(rf"\| all \| {mean:.3f} \(.* to .*\), [+-]\d+\.\d %", printed)
    assert (out / "results.png").exists()
    # Again: nothing is trained.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert len(before) == 4
    run("compare_training.py", *command)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}


def test_building_trees(tmp_path: Path) -> None:
    run("bench_drafting.py", "--batch-sizes", "1,2", "--out", tmp_path / "drafting.json")
    rows = json.loads((tmp_path / "drafting.json").read_text())["rows"]
    assert [row["batch_size"] for row in rows] == [1, 2]
    assert all(0 < row["p10_ms"] <= row["median_ms"] <= row["p99_ms"] for row in rows)
    assert all(row["nodes_per_request"] > 1 for row in rows)


@pytest.mark.slow
def test_simulated_dynamic_trees(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = (REPO / "demo" / "prompts.jsonl").read_text().splitlines(keepends=True)
    prompts.write_text("".join(lines[:8]))
    figures = tmp_path / "figures.json"
    run("simulate_dynamic.py", prompts, "--batch-sizes", "1,4", "--json", figures)
    one, four = json.loads(figures.read_text())
    assert one["speed_up"] > four["speed_up"] > 1
    assert one["heads_ran"] == 1


@pytest.mark.slow
def test_typical_acceptance(tmp_path: Path) -> None:
    few = ["--prompts", "4", "--max-tokens", "24", "--tree", "chain"]
    run("bench_typical.py", *few, "--out", tmp_path / "typical.json")
    rules = json.loads((tmp_path / "typical.json").read_text())["rules"]
    lossless, default, _ = rules.values()
    assert default["tokens_per_step"][0] > lossless["tokens_per_step"][0]
    assert default["log_likelihood"] > lossless["log_likelihood"]


@pytest.mark.slow
def test_random_text(tmp_path: Path) -> None:
    """Roughly: how fast steps are depends on what else the machine does."""
    few = ["--parameters", "10e6", "--rounds", "1"]
    run("bench_random_text.py", *few, "--out", tmp_path / "random.json")
    ratios = json.loads((tmp_path / "random.json").read_text())["over_no_plugin"]
    assert ratios["no plugin"] == [1.0]
    assert min(ratios["plugin"] + ratios["plugin, no drafts"]) > 0.5


@pytest.mark.slow
def test_engines_on_ray(tmp_path: Path) -> None:
    few = ["--parameters", "5e6", "--prompts", 8, "--rounds", 1, "--max-tokens", 4]
    printed = run("bench_ray.py", *few, "--out", tmp_path / "ray.json")
    assert "two over one: " in printed
    (speeds,) = json.loads((tmp_path / "ray.json").read_text())["tokens_per_second"]
    assert min(speeds["1"], speeds["2"]) > 0


@pytest.mark.slow
def test_load_steps(tmp_path: Path) -> None:
    few = ["--parameters", "5e6", "--dtype", "float32", "--requests", 4, "--long", 60, "--short", 8]
    files = ["--out", tmp_path / "sizes.json", "--plot", tmp_path / "sizes.png"]
    printed = run("bench_load_steps.py", *few, *files)
    assert re.search(r"^alone +\d+ steps", printed, re.M)
    assert re.search(r"^4 requests +\d+ steps", printed, re.M)
    steps = json.loads((tmp_path / "sizes.json").read_text())["steps"]
    assert {step["num_requests"] for step in steps} >= {1, 4}
    assert sum(step["num_nodes"] for step in steps) > 20
    assert (tmp_path / "sizes.png").stat().st_size > 1000
