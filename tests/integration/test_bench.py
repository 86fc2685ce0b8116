"""`vllm-medusa bench` with real engines on the demo model."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.integration.command_line import DEMO_MODEL, MEDUSA_HEADS, environment, run_tool
from vllm_medusa.engines.process import EngineProcessError
from vllm_medusa.engines.server import ServerProcess
from vllm_medusa.stepcost.costs import read_step_costs

pytestmark = pytest.mark.engine

OPTIONS = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 2**28}
HAS_OWN_MEDUSA = version("vllm").startswith("0.32.")
TIMEOUT_S = 600


def bench_arguments(*arguments: str | Path) -> list[str]:
    common = ["bench", "--model", DEMO_MODEL, "--heads", MEDUSA_HEADS, "--dtype", "float32"]
    options = ["--llm-options", json.dumps(OPTIONS)]
    return [*map(str, [*common, *options, *arguments])]


def bench_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "vllm_medusa.cli.main", *bench_arguments(*arguments)]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_tool(*bench_arguments(*arguments))


#: Names of the lossless variants to a word of the command line each, or to nothing.
FEW: dict[str, Any] = {"tree": "tree=cpu-8"}
ALL = {**FEW, "chain": None, "vllm-chain": None, "ngram": None}


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def offline(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A strict run with lossless variants, one that is missing, and one of another model."""
    folder = tmp_path_factory.mktemp("bench")
    config = folder / "bench.yaml"
    variants = {
        **(FEW if request.param == "few" else ALL),
        "eagle": f"eagle={folder}/none",
        "other": {"llm_options": {"hf_overrides": {"rms_norm_eps": 0.1}}},
    }
    settings = {"variants": variants, "batch_sizes": [1, 2], "rounds": 2, "max_tokens": 20}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    out = folder / "out"
    return out, bench("--config", config, "--strict", "--out", out)


@pytest.fixture(scope="module")
def results(offline: tuple[Path, Any]) -> dict[str, Any]:
    out, _ = offline
    loaded: dict[str, Any] = json.loads((out / "results.json").read_text())
    return loaded


@pytest.mark.timeout(TIMEOUT_S)
def test_strict_fails_for_the_other_model_only(
    offline: tuple[Path, Any], results: dict[str, Any]
) -> None:
    _, run = offline
    assert run.returncode == 2, run.stderr[-3000:]
    last = run.stderr.strip().splitlines()[-1]
    assert "error: --strict: outputs differ from the baseline's: other" in last
    assert "tree" not in last
    assert "ngram" not in last
    sameness = {found.pop("variant"): found for found in results["sameness"]}
    other = sameness.pop("other")
    for name, found in sameness.items():
        assert (found["num_compared"], found["num_mismatches"]) == (6, 0), name
    assert other["num_mismatches"] > 0
    assert other["num_near_ties"] < other["num_mismatches"]
    for mismatch in other["mismatches"]:
        # What the baseline took is what the baseline finds likelier.
        assert mismatch["baseline_logprob"] > mismatch["variant_logprob"]
        assert mismatch["baseline_token"] != mismatch["variant_token"]


def test_every_variant_ran_and_drafted(results: dict[str, Any]) -> None:
    variants = {variant["name"]: variant for variant in results["variants"]}
    missing = {name for name, variant in variants.items() if variant["unavailable"]}
    assert missing == {"eagle"} | ({"vllm-chain"} & set(variants) if not HAS_OWN_MEDUSA else set())
    assert "no such file or directory" in variants["eagle"]["unavailable"]
    figures = {(figure["variant"], figure["batch_size"]): figure for figure in results["figures"]}
    assert len(figures) == 2 * (len(variants) - len(missing))
    for (name, _), figure in figures.items():
        assert len(figure["tokens_per_s"]["values"]) == 2
        for key in ("tokens_per_s", "step_ms", "ttft_ms", "tpot_ms", "peak_memory_bytes"):
            value = figure[key]
            assert (value if isinstance(value, int) else value["median"]) > 0
        drafts = name not in ("baseline", "other")
        assert (figure["tokens_per_step"]["median"] > 1) == drafts
        assert bool(figure["acceptance_by_depth"]) == drafts
        assert (figure["speedup"] is None) == (name == "baseline")
    tree, chain = figures["tree", 1], figures.get(("chain", 1))
    assert len(tree["acceptance_by_depth"]) <= 4
    if chain is not None:
        assert tree["tokens_per_step"]["median"] > chain["tokens_per_step"]["median"]
        if HAS_OWN_MEDUSA:  # the same heads and the same chain
            own_chain = figures["vllm-chain", 1]
            assert own_chain["tokens_per_step"] == chain["tokens_per_step"]
    assert {row["category"] for row in results["categories"]} >= {"code", "writing"}


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_sampled(tmp_path: Path) -> None:
    """Seeded requests: ours give the baseline's text, and vLLM's own are not compared."""
    few = ["--batch-sizes", "2", "--rounds", "2", "--max-tokens", "20", "--strict"]
    sampled = ["--temperature", "0.8", "--variants", "tree=cpu-8", "ngram"]
    done = bench(*few, *sampled, "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    (sameness,) = found["sameness"]
    assert sameness["variant"] == "tree=cpu-8"
    assert (sameness["num_compared"], sameness["num_mismatches"]) == (4, 0)
    figures = {figure["variant"]: figure for figure in found["figures"]}
    assert figures["tree=cpu-8"]["tokens_per_step"]["median"] > 1
    assert "Sampled at temperature 0.8" in (tmp_path / "report.md").read_text()


def test_files_of_a_run(offline: tuple[Path, Any], results: dict[str, Any]) -> None:
    out, run = offline
    assert {path.name for path in out.iterdir()} == {
        *("report.md", "results.json", "results.jsonl"),
        *("speedup_by_batch.png", "speedup_by_tokens_per_step.png", "acceptance_by_depth.png"),
    }
    report = (out / "report.md").read_text()
    assert "eagle | unavailable | no such file or directory" in report
    assert "not a tie" in report
    header, *lines = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    assert header["provenance"] == results["provenance"]
    assert results["provenance"]["versions"]["vllm"] == version("vllm")
    assert results["provenance"]["machine"]["cpu"]
    # Interleaved: within a round and batch size every variant has its turn.
    order = [(line["round"], line["batch_size"], line["variant"]) for line in lines]
    names = list(dict.fromkeys(name for _, _, name in order))
    assert order == [(r, b, name) for r in (1, 2) for b in (1, 2) for name in names]
    assert re.search(r"turns left: \d+, about \d+ s", run.stderr)
    assert "tree=cpu-8" not in names  # the file's name for it holds


def test_compare_a_run_with_itself(offline: tuple[Path, Any]) -> None:
    out, _ = offline
    run = run_tool("bench", "--compare", out, out / "results.json")
    assert run.returncode == 0
    assert "0 of" in run.stdout
    assert "1.000" in run.stdout
    assert "different" not in run.stdout


def wait_until(condition: Any, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def engines_of(pid: int) -> list[psutil.Process]:
    """The starter of the engines and them; not what else a run starts for a moment, such as git."""
    found = []
    for process in descendants(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "vllm_medusa.engines.worker" in process.cmdline():
                found.append(process)
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    assert gone


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_engines_end_with_a_run_that_is_stopped(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        bench_command("--variants", "tree", "--out", tmp_path), env=environment()
    ) as process:
        wait_until(lambda: len(engines_of(process.pid)) > 1)
        engines = engines_of(process.pid)
        process.send_signal(number)
        assert process.wait(30) in (128 + number, 130)
    assert_gone(engines)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_baseline_that_does_not_run(tmp_path: Path) -> None:
    options = {**OPTIONS, "max_model_len": 10**6}
    run = bench("--variants", "chain", "--llm-options", json.dumps(options), "--out", tmp_path)
    assert run.returncode == 2
    (error,) = [line for line in run.stderr.splitlines() if "error:" in line]
    assert "the baseline cannot run: " in error
    assert "max_model_len" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_server_ends_with_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    processes = []

    def fail() -> None:
        with ServerProcess(str(DEMO_MODEL), None, OPTIONS, {}) as server:
            wait_until(lambda: len(descendants(server.pid)) > 0)  # the engine's own process
            processes.extend([psutil.Process(server.pid), *descendants(server.pid)])
            raise RuntimeError("whatever")

    with pytest.raises(RuntimeError, match="whatever"):
        fail()
    assert_gone(processes)


@pytest.mark.slow
def test_a_server_that_does_not_start() -> None:
    with (
        ServerProcess(str(DEMO_MODEL), None, {"max_model_len": 10**6}, {}) as server,
        pytest.raises(EngineProcessError) as error,
    ):
        server.wait()
    assert "max_model_len" in error.value.reason


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_online(tmp_path: Path) -> None:
    arguments = ["--online", "--variants", "tree=cpu-8", "--request-rates", "8,inf"]
    arguments += ["--num-requests", "8", "--rounds", "2", "--max-tokens", "24"]
    run = bench(*arguments, "--out", tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    figures = {(figure["variant"], figure["load"]): figure for figure in results["figures"]}
    loads = ("8/s", "all at once")
    assert set(figures) == {(name, load) for name in ("baseline", "tree=cpu-8") for load in loads}
    for (name, _), figure in figures.items():
        assert figure["num_failed"] == 0
        assert len(figure["e2e_ms"]["values"]) == 2
        for key in ("tokens_per_s", "ttft_ms", "e2e_ms"):
            assert figure[key]["median"] > 0
        assert (figure["tokens_per_step"]["median"] > 1) == (name != "baseline")
        assert bool(figure["acceptance_by_depth"]) == (name != "baseline")
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        assert line["result"]["completed"] == 8
        assert line["metrics"]["vllm:generation_tokens"] >= line["result"]["total_output_tokens"]
    assert (tmp_path / "latency_by_throughput.png").exists()


@pytest.mark.slow
def test_servers_end_with_a_run_that_is_stopped(tmp_path: Path) -> None:
    arguments = ["--online", "--variants", "chain", "--out", tmp_path]
    with subprocess.Popen(
        bench_command(*arguments), env=environment(), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "up after" in line:
                break
        # The baseline's server is up with its engine, and the load generator begins.
        wait_until(lambda: len(descendants(process.pid)) > 2)
        servers = descendants(process.pid)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert_gone(servers)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_profile_of_steps(tmp_path: Path) -> None:
    run = bench("--profile-steps", "--batch-sizes", "1", "--rounds", "1", "--out", tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Time of the stages of a step" in run.stdout
    costs = read_step_costs(tmp_path / "step_costs.json")
    rows = {(row.num_drafts, row.num_leaves): row.round_ms for row in costs.rows}
    # No speculation, the chain of 4, and trees of 4 to 64 nodes.
    assert [drafts for drafts, _ in sorted(rows)] == [0, 4, 4, 8, 16, 32, 64]
    assert all(step_ms > 0 for times in rows.values() for step_ms in times)
    stages = json.loads((tmp_path / "step_costs.json").read_text())["stages"]
    assert {stage["num_drafts"] for stage in stages} == {4, 64}
    for stage in stages:
        assert stage["stage_ms"]["heads"] > 0
        assert sum(stage["stage_ms"].values()) <= stage["step_ms"]
