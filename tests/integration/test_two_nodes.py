"""Two Ray nodes on this machine, one is killed: no row is lost, and none is there twice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.integration import test_batch_on_ray as batch
from tests.integration.command_line import DEMO_MODEL, REPO
from tests.integration.test_distill import finish, shards, start

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

NODE = {"num_cpus": 3, "object_store_memory": 100 << 20, "include_dashboard": False}
prompts, expected = batch.prompts, batch.expected  # fixtures
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
DISTILL = [
    *f"distill --model {DEMO_MODEL} --prompts {DEMO_MODEL.parent / 'prompts.jsonl'}".split(),
    *("--max-tokens", "64", "--shard-size", "4", "--temperature", "0.8", "--seed", "5"),
    *("--llm-options", json.dumps(ENGINE)),
]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head and a second node; what runs there finds the package and knows its address."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    try:
        yield cluster
    finally:
        cluster.shutdown()


def kill_second_node(cluster: Any) -> None:
    """Kill it without a word, and the engine that runs on it."""
    (second,) = cluster.worker_nodes
    raylet = psutil.Process(second.all_processes["raylet"][0].process.pid)
    on_it = raylet.children(recursive=True)
    assert any(process.cmdline()[0].startswith("ray::MapWorker(") for process in on_it)
    cluster.remove_node(second, allow_graceful=False)
    _, left = psutil.wait_procs(on_it, timeout=60)
    assert left == []


def test_batch(
    tmp_path: Path,
    cluster: Any,
    prompts: list[dict[str, str]],
    expected: list[list[int]],
) -> None:
    given, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    given.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    arguments = batch.command(given, out, "--engines", "2", "--ray", cluster.address)
    with batch.started(arguments) as (process, family):
        batch.wait_for_rows(process, out, family)
        kill_second_node(cluster)
        _, progress = process.communicate()
    assert process.returncode == 0, progress[-3000:]
    batch.check(out, "json", prompts, expected)


def test_distillation(tmp_path: Path, cluster: Any) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    status, _, progress = finish([*DISTILL, "--out", str(alone)])
    assert status == 0, progress
    on_ray = ["--ray", cluster.address, "--num-workers", "2"]
    with start([*DISTILL, "--out", str(out), *on_ray]) as process:
        while not shards(out) and process.poll() is None:
            time.sleep(0.05)
        assert len(shards(out)) < len(shards(alone)) - 2
        kill_second_node(cluster)
        _, progress = process.communicate()
    assert process.returncode == 0, progress
    assert shards(out) == shards(alone)
