"""Tensor parallelism over Ray workers: two nodes of a Ray cluster, both on this machine."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.integration.command_line import DEMO_MODEL, MEDUSA_HEADS, REPO
from tests.integration.conftest import greedy, open_engine, spec_metrics, token_ids
from tests.integration.ray_on_cpu import ray_on_cpu
from vllm_medusa.errors import UserError

pytestmark = [pytest.mark.engine, pytest.mark.slow]

#: A tree for one or two requests, another for more.
SCHEDULE = [[1, 2, 16], [3, 64, 12]]
SPEC = {
    "method": "medusa",
    "model": str(MEDUSA_HEADS),
    "num_speculative_tokens_per_batch_size": SCHEDULE,
}
NUM_PROMPTS = 4
MAX_TOKENS = 32
ON_RAY = {
    "distributed_executor_backend": "ray",
    "tensor_parallel_size": 2,
    "gpu_memory_utilization": 0.1,
}


NODE = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
#: A `sitecustomize` that leaves a process without this package.
WITHOUT_PLUGIN = """
import sys

class Absent:
    def find_spec(name, *_):
        if name == "vllm_medusa":
            raise ModuleNotFoundError("No module named 'vllm_medusa'", name=name)

sys.meta_path.insert(0, Absent)
"""


@contextmanager
def two_nodes(patch: pytest.MonkeyPatch, *second_path: Path) -> Iterator[None]:
    """A cluster of two nodes with a CPU each, joined by this process.

    Args:
        patch: for this process's environment, which the nodes inherit.
        second_path: what the second node's Python finds before all else.
    """
    patch.setenv("RAY_worker_niceness", "0")
    patch.setenv("VLLM_HOST_IP", "127.0.0.1")
    patch.setenv("PYTHONPATH", str(REPO))
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [*second_path, REPO])))
        cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        with ray_on_cpu():
            yield
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    with (DEMO_MODEL.parent / "prompts.jsonl").open() as lines:
        return [json.loads(line)["prompt"] for line in itertools.islice(lines, NUM_PROMPTS)]


def demo_engine(**options: Any) -> Any:
    return open_engine(DEMO_MODEL, skip_tokenizer_init=False, **options)


def by_grammar(llm: Any) -> list[list[int]]:
    """Greedy texts that follow a grammar."""
    grammar = StructuredOutputsParams(
        regex=r"(def|class) [a-z_]{3,12}\([a-z]{1,6}(, [a-z]{1,6})?\):"
    )
    params = SamplingParams(temperature=0, max_tokens=24, structured_outputs=grammar)
    return token_ids(llm.generate(["import os\n\n", "class A:\n    "], params, use_tqdm=False))


def test_two_workers_on_ray_give_the_text_of_one(
    prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_MEDUSA_TIMERS", "1")
    with demo_engine() as llm:
        alone = greedy(llm, prompts, MAX_TOKENS)
        alone_by_grammar = by_grammar(llm)
    with two_nodes(monkeypatch), demo_engine(**ON_RAY, speculative_config=SPEC) as llm:
        llm.collective_rpc("medusa_step_times")
        assert greedy(llm, prompts, MAX_TOKENS) == alone
        times = llm.collective_rpc("medusa_step_times")
        counted = llm.collective_rpc("medusa_counters")
        metrics = spec_metrics(llm)
        assert by_grammar(llm) == alone_by_grammar
    assert len(counted) == len(times) == 2
    assert counted[0] == counted[1]
    assert counted[0]["forks_accepted"] > NUM_PROMPTS
    assert metrics["num_accepted_tokens"] > NUM_PROMPTS * MAX_TOKENS / 4
    assert len(times[0]) == len(times[1]) > MAX_TOKENS / 5


def test_node_without_the_plugin_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_PLUGIN)
    with (
        two_nodes(monkeypatch, tmp_path),
        pytest.raises(UserError) as caught,
        demo_engine(**ON_RAY, speculative_config=SPEC),
    ):
        pass
    assert str(caught.value).startswith("vllm_medusa is not installed on the Ray node 127.0.0.1, ")
