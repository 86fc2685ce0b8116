"""Number formats, compilation and processes: the text with trees is that without speculation.

The demo model and its heads, so that drafts are accepted on paths other than the first also where
the workers are processes of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from tests import checkpoints
from tests.integration.command_line import (
    DEMO_MODEL,
    MEDUSA_HEADS,
    RECURRENT_HEADS,
    engine_config,
    run_python,
)
from tests.integration.conftest import counters, greedy, open_engine, spec_metrics, token_ids
from tests.integration.seeing_heads import write_seeing_heads
from vllm_medusa.heads import load_heads

pytestmark = pytest.mark.engine

SPEC = {"method": "medusa", "model": str(MEDUSA_HEADS), "tree": "cpu-16"}
NUM_PROMPTS = 6
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    with (DEMO_MODEL.parent / "prompts.jsonl").open() as lines:
        return [json.loads(line)["prompt"] for line in itertools.islice(lines, NUM_PROMPTS)]


@pytest.fixture(scope="module")
def reference(prompts: list[str]) -> list[list[int]]:
    """Greedy text in float32, without speculation."""
    with demo_engine() as llm:
        return greedy(llm, prompts, MAX_TOKENS)


def demo_engine(**options: Any) -> Any:
    return open_engine(DEMO_MODEL, skip_tokenizer_init=False, **options)


def check(llm: Any, prompts: list[str], reference: list[list[int]]) -> None:
    """The same text, from trees whose second and later paths were accepted as well."""
    assert greedy(llm, prompts, MAX_TOKENS) == reference
    counted = llm.collective_rpc("medusa_counters")
    assert counted[0]["forks_accepted"] > NUM_PROMPTS
    # Every rank verified and committed the same paths.
    assert all(other == counted[0] for other in counted)
    assert spec_metrics(llm)["num_accepted_tokens"] > NUM_PROMPTS * MAX_TOKENS / 4


# Number formats.


def check_up_to_ties(reference: list[Any], outputs: list[Any], tolerance: float) -> int:
    """Compare greedy outputs up to where the reference's two best tokens are as good as equal.

    Returns:
        How many tokens were equal.

    """
    num_equal = 0
    for expected, output in zip(reference, outputs, strict=True):
        places = zip(expected.outputs[0].logprobs, *token_ids([expected, output]), strict=True)
        for place, right, token in places:
            if token != right:
                best = sorted((entry.logprob for entry in place.values()), reverse=True)
                assert best[0] - best[1] < tolerance, (right, token, best)
                break
            num_equal += 1
    return num_equal


def test_bfloat16(prompts: list[str]) -> None:
    """In bfloat16 vLLM's own text depends on the batch where two tokens are tied."""
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=2)
    with demo_engine(dtype="bfloat16") as llm:
        reference = llm.generate(prompts, params, use_tqdm=False)
    with demo_engine(dtype="bfloat16", speculative_config=SPEC) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert counters(llm)["forks_accepted"] > NUM_PROMPTS
    # Logits around 16 have steps of 1/16 in bfloat16.
    num_equal = check_up_to_ties(reference, outputs, tolerance=0.13)
    assert num_equal > NUM_PROMPTS * MAX_TOKENS / 2


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e5m2", "fp8_e4m3"])
def test_quantised_kv_cache(prompts: list[str], kv_cache_dtype: str) -> None:
    """Forks copy blocks as they are, whatever they hold."""
    with demo_engine(kv_cache_dtype=kv_cache_dtype) as llm:
        reference = greedy(llm, prompts, MAX_TOKENS)
    with demo_engine(kv_cache_dtype=kv_cache_dtype, speculative_config=SPEC) as llm:
        check(llm, prompts, reference)


@pytest.mark.slow
def test_bfloat16_in_processes_of_their_own(
    prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the processor has AMX the worker dies without `plugin._initialise_amx`."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    options = {"dtype": "bfloat16", "distributed_executor_backend": "mp"}
    with demo_engine(**options, speculative_config=SPEC) as llm:
        outputs = greedy(llm, prompts, MAX_TOKENS)
        assert [len(tokens) for tokens in outputs] == [MAX_TOKENS] * NUM_PROMPTS
        assert counters(llm)["forks_accepted"] > NUM_PROMPTS


# Compilation.


@pytest.mark.parametrize("tree", ["cpu-16", pytest.param("chain", marks=pytest.mark.slow)])
def test_compiled(prompts: list[str], reference: list[list[int]], tree: str) -> None:
    """vLLM's default mode, of which the graphs read token positions from one buffer."""
    spec = {**SPEC, "tree": tree}
    with demo_engine(enforce_eager=False, speculative_config=spec) as llm:
        compilation = llm.llm_engine.vllm_config.compilation_config
        assert compilation.mode.name != "NONE"
        if tree == "cpu-16":
            check(llm, prompts, reference)
        else:
            assert greedy(llm, prompts, MAX_TOKENS) == reference
            assert spec_metrics(llm)["num_accepted_tokens"] > NUM_PROMPTS


# Processes.


@pytest.mark.slow
def test_engine_in_a_process_of_its_own(
    prompts: list[str], reference: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with demo_engine(distributed_executor_backend="mp", speculative_config=SPEC) as llm:
        check(llm, prompts, reference)


@pytest.mark.slow
def test_async_llm(prompts: list[str], reference: list[list[int]]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(DEMO_MODEL),
        speculative_config=SPEC,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        block_size=32,
        num_gpu_blocks_override=1200,
    )
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)

    async def generate(engine: AsyncLLM, index: int) -> list[int]:
        async for output in engine.generate(prompts[index], params, f"request-{index}"):
            tokens = list(output.outputs[0].token_ids)
        return tokens

    async def run() -> tuple[list[list[int]], Any]:
        engine = AsyncLLM.from_engine_args(arguments)
        try:
            tokens = await asyncio.gather(*(generate(engine, i) for i in range(NUM_PROMPTS)))
            return tokens, await engine.collective_rpc("medusa_counters")
        finally:
            engine.shutdown()

    tokens, counted = asyncio.run(run())
    assert tokens == reference
    assert counted[0]["forks_accepted"] > NUM_PROMPTS


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Engine options for tensor parallelism over two processes of one core each."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    return {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "gpu_memory_utilization": 0.1,
    }


def own_lm_heads(directory: Path) -> Path:
    """Write the demo heads with lm_heads of their own, which are the target's."""
    directory.mkdir()
    shutil.copy(MEDUSA_HEADS / "medusa_tree.json", directory)
    tensors = checkpoints.sequential_tensors(load_heads(MEDUSA_HEADS))
    num_layers = 1 + max(int(name.split(".")[1]) for name in tensors)
    embedding = load_file(DEMO_MODEL / "model.safetensors")["model.embed_tokens.weight"]
    for head in {name.split(".")[0] for name in tensors}:
        tensors[f"{head}.{num_layers}.weight"] = embedding.clone()
    save_file(tensors, directory / "medusa_lm_head.safetensors")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["target", "own", "seeing", "recurrent"])
def test_tensor_parallel(
    prompts: list[str],
    reference: list[list[int]],
    tmp_path: Path,
    two_ranks: dict[str, Any],
    kind: str,
) -> None:
    heads = MEDUSA_HEADS
    if kind == "own":
        heads = own_lm_heads(tmp_path / "own")
    elif kind == "seeing":
        heads = write_seeing_heads(tmp_path / "seeing", has_prefix=True)
    elif kind == "recurrent":
        heads = RECURRENT_HEADS
    spec = {**SPEC, "model": str(heads)}
    with demo_engine(**two_ranks, speculative_config=spec) as llm:
        check(llm, prompts, reference)
        check_sampled_blocks(llm, prompts)
        counted = llm.collective_rpc("medusa_counters")
        assert len(counted) == 2
        assert counted[0] == counted[1]


@pytest.mark.slow
@pytest.mark.parametrize("heads", [MEDUSA_HEADS, RECURRENT_HEADS], ids=lambda path: path.name)
def test_tensor_parallel_with_dynamic_trees(
    heads: Path,
    prompts: list[str],
    reference: list[list[int]],
    two_ranks: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Costs differ from rank to rank where they are measured, trees do not."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    spec = {"method": "medusa", "model": str(heads)}
    for _ in range(2):
        with demo_engine(**two_ranks, speculative_config=spec) as llm:
            assert greedy(llm, prompts, MAX_TOKENS) == reference
            counted = llm.collective_rpc("medusa_counters")
            assert counted[0] == counted[1]
            assert counted[0]["heads_runs"] > 20
        assert len(list((tmp_path / "medusa_step_costs").iterdir())) == 1


def check_sampled_blocks(llm: Any, prompts: list[str]) -> None:
    """Sampled text without seeds leaves the same blocks behind on all ranks as its prefill does."""
    params = SamplingParams(temperature=0.8, max_tokens=80, ignore_eos=True)
    longer = [
        {"prompt_token_ids": [*output.prompt_token_ids, *output.outputs[0].token_ids]}
        for output in llm.generate(prompts, params, use_tqdm=False)
    ]
    from_blocks = greedy(llm, longer, MAX_TOKENS)
    assert llm.reset_prefix_cache()
    assert greedy(llm, longer, MAX_TOKENS) == from_blocks


# Ray.

RAY = """
import pickle, sys
import ray

ray.init(
    address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20,
    log_to_driver=False,
)

@ray.remote(num_cpus=1)
class Actor:
    def build(self, path, init_method):
        import sys
        assert "vllm_medusa" not in sys.modules
        with open(path, "rb") as file:
            config = pickle.load(file)
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        wrapper = WorkerWrapperBase(rpc_rank=0, global_rank=0)
        wrapper.init_worker([dict(
            vllm_config=config, local_rank=0, rank=0, distributed_init_method=init_method,
            is_driver_worker=True,
        )])
        wrapper.init_device()
        wrapper.load_model()
        runner = wrapper.worker.model_runner
        num_nodes = 1 + runner.drafter.config.limits.max_nodes
        return [type(wrapper.worker).__name__, type(runner).__name__, num_nodes]

try:
    print("BUILT", *ray.get(Actor.remote().build.remote(sys.argv[1], sys.argv[2])))
finally:
    ray.shutdown()
"""


def test_ray_actor(tmp_path: Path) -> None:
    """A Ray actor makes the worker of a configuration that was made outside.

    The quick part of what `test_ray_executor.py` shows: the plugin loads in the actor, the
    configuration unpickles, ``parallel_config.worker_cls`` resolves to our worker, which loads
    target and heads.
    """
    options = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "block_size": 32}
    config = engine_config(DEMO_MODEL, SPEC, distributed_executor_backend="uni", **options)
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(config))
    source = f"import sys; sys.argv[1:] = [{str(path)!r}, 'file://{tmp_path}/init']\n" + RAY
    result = run_python(source)
    assert "BUILT MedusaWorker MedusaCPUModelRunner 17" in result.stdout, result.stderr[-3000:]
