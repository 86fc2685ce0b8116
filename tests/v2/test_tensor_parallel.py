"""Two ranks draft, verify and compact the same as one: on the CPU, over gloo.

The ranks are forks of a process of its own, which has no ranks from before, so that what stands for
a GPU in this process is in them too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.integration.conftest import greedy, open_engine, random_prompts, spec_metrics
from tests.v2.conftest import IS_INTERPRETED
from tests.v2.oracle import oracle
from tests.v2.trees import dynamic, spec

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="two ranks on one CPU")

REPO = Path(__file__).resolve().parents[2]
NUM_PROMPTS, MAX_TOKENS = 3, 16
TWO_RANKS = {
    "tensor_parallel_size": 2,
    "distributed_executor_backend": "mp",
    "gpu_memory_utilization": 0.1,
}


@contextmanager
def head_drafts(folder: Path) -> Iterator[None]:
    """Write what the heads drafted, rank by rank, also where an oracle's drafts are run."""
    from vllm.distributed import get_tensor_model_parallel_rank

    from vllm_medusa.plugin.worker.v2 import speculator

    original = speculator.TreeSpeculator.propose

    def propose(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        tokens: Tensor = original(self, *args, **kwargs)
        if not kwargs.get("dummy_run"):
            name = f"rank-{get_tensor_model_parallel_rank()}"
            with (folder / name).open("a") as file:
                print(json.dumps(tokens.tolist()), file=file)
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator.TreeSpeculator, "propose", propose)
        yield


def run(folder: Path, job: dict[str, Any], **options: Any) -> tuple[list[list[int]], int]:
    """Text of an engine, and how many drafts it accepted; the heads' drafts go to the folder."""
    from tests.v2 import interpreter
    from vllm_medusa.plugin.worker.v2 import attention

    folder.mkdir()
    prompts, futures = random_prompts(NUM_PROMPTS), job["futures"]
    with pytest.MonkeyPatch.context() as patch, head_drafts(folder), oracle(prompts, futures):
        patch.setattr(attention, "tree_attention", interpreter.attend_with_torch())
        settings = {"max_model_len": 256, "max_num_seqs": 8, **options}
        with open_engine(job["model"], speculative_config=job["spec"], **settings) as llm:
            return greedy(llm, prompts, MAX_TOKENS), spec_metrics(llm)["num_accepted_tokens"]


@pytest.mark.parametrize("make", [spec, dynamic])
def test_two_ranks(
    engine: Callable[..., Any],
    tiny_model: Path,
    seeing_heads: Path,
    reference: list[list[int]],
    tmp_path: Path,
    make: Callable[..., Any],
) -> None:
    futures = [text[:MAX_TOKENS] for text in reference[:NUM_PROMPTS]]
    job = {"model": str(tiny_model), "spec": make(seeing_heads), "futures": futures}
    wanted, accepted = run(tmp_path / "one", job)
    assert wanted == futures
    command = [sys.executable, "-m", "tests.v2.test_tensor_parallel", tmp_path / "two"]
    # What vLLM compiles for a split vocabulary would ask Triton for its GPU.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        command,
        cwd=REPO,
        env=environment,
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [futures, accepted]
    one = (tmp_path / "one" / "rank-0").read_text()
    assert one.count("\n") > 3
    for rank in range(2):
        assert (tmp_path / "two" / f"rank-{rank}").read_text() == one
    if make is spec:
        assert accepted > 2 * NUM_PROMPTS


def main() -> None:
    import tests.conftest  # noqa: F401
    from tests.v2 import interpreter

    interpreter.install()
    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    result = run(Path(sys.argv[1]), json.loads(sys.stdin.read()), **TWO_RANKS)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
