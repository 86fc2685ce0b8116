"""vLLM's Ray executor on CPUs, for tests: what keeps it from them is lifted in the calling process.

vLLM names no resource of Ray's for its CPU platform, and asks each worker for its GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2


class RayWorkerOnCpu(ray_executor_v2.RayWorkerProc):
    """A worker without a GPU."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        import ray

        return ray.get_runtime_context().get_node_id(), []


@contextmanager
def ray_on_cpu() -> Iterator[None]:
    """Let engines of this process have their workers on a Ray cluster's CPUs."""
    executor = ray_executor_v2.RayExecutorV2
    original, made = executor._init_executor, []

    def remember(self: Any) -> None:
        made.append(self)
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "ray_device_key", "CPU")
        patch.setattr(ray_executor_v2, "RayWorkerProc", RayWorkerOnCpu)
        patch.setattr(executor, "_get_actor_resource_kwargs", staticmethod(lambda: {"num_gpus": 0}))
        patch.setattr(executor, "_init_executor", remember)
        try:
            yield
        finally:
            # One that failed vLLM ends with Python, when there is no Ray any more.
            for each in made:
                each.shutdown()
