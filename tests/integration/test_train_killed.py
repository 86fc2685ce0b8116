"""`vllm-medusa train` in processes of its own: killed ten times, and two at once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training import counting_rows, save_llama, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_KILLS = 10
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("train")
    model = save_llama(directory / "model")
    data = write_rows(directory / "data", counting_rows(60))
    return [
        *("train", "--model", str(model), "--data", str(data), "--dtype", "float32"),
        *("--held-out", "0.1", "--batch-tokens", "96", "--num-heads", "3", "--lr", "5e-3"),
    ]


def run(options: list[str], out: Path, *launch: str) -> None:
    command = [sys.executable, *launch, "-m", "vllm_medusa.cli.main", *options, "--out", str(out)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def result(heads: Path) -> tuple[bytes, dict[str, Any], list[str]]:
    """Weights, report and names of a finished training."""
    return (
        (heads / "medusa_lm_head.safetensors").read_bytes(),
        json.loads((heads / "report.json").read_text()),
        sorted(path.name for path in heads.iterdir()),
    )


def kill_at_random(options: list[str], out: Path, rng: random.Random) -> None:
    """Start the training, and kill it some time after it began to write."""
    partial = out.with_name(out.name + ".partial")
    before = {path: path.stat().st_mtime_ns for path in partial.glob("*")}
    with subprocess.Popen(
        [sys.executable, "-m", "vllm_medusa.cli.main", *options, "--out", str(out)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while {path: path.stat().st_mtime_ns for path in partial.glob("[!.]*")} == before:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()


def test_killed_ten_times_ends_as_if_undisturbed(options: list[str], tmp_path: Path) -> None:
    options = [*options, "--steps", "1500", "--eval-every", "100", "--save-every", "2"]
    run(options, tmp_path / "undisturbed")
    rng = random.Random(0)
    for _ in range(NUM_KILLS):
        kill_at_random(options, tmp_path / "killed", rng)
        assert not (tmp_path / "killed").exists()
    run(options, tmp_path / "killed")
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")
    assert not (tmp_path / "killed.partial").exists()


def test_two_processes_learn_as_one_with_twice_the_batches(
    options: list[str], tmp_path: Path
) -> None:
    options = [*options, "--steps", "20", "--eval-every", "10"]
    # What `accelerate launch` starts for several GPUs; on CPUs it would want MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run(options, tmp_path / "two", *launch)
    run([*options, "--grad-accumulation", "2"], tmp_path / "one")
    two, one = (json.loads((tmp_path / n / "report.json").read_text()) for n in ("two", "one"))
    provenance = json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert provenance["identity"]["num_processes"] == 2
    for ours, theirs in zip(two["loss"], one["loss"], strict=True):
        assert ours["heads"] == pytest.approx(theirs["heads"], abs=1e-3)
    assert two["held_out"]["with_loops"]["positions"] == one["held_out"]["with_loops"]["positions"]
    assert two["best_step"] == one["best_step"]
    weights = [load_file(tmp_path / name / "medusa_lm_head.safetensors") for name in ("two", "one")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-3, rtol=0)
