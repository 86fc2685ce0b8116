"""What a step with trees costs, by count: kernels, waits for the device, bytes attention reads.

There is no clock to trust in the interpreter. Run with ``-s`` to see the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import greedy
from tests.kernels.cases import random_case
from tests.kernels.counting import Calls, counted_loads
from tests.v2.conftest import IS_INTERPRETED
from tests.v2.trees import dynamic, spec
from vllm_medusa.kernels import NO_TREE
from vllm_medusa.kernels.attention import Step, tree_attention

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="counts in the interpreter")

NUM_NODES = 16
CONTEXT = 2048
HEADS, KV_HEADS, HEAD_SIZE, PAGE = 4, 1, 32, 16


def long_step(num_reqs: int, has_trees: bool) -> dict[str, Any]:
    """Requests of `CONTEXT` tokens that run a tree, or a causal chain of as many queries."""
    case = random_case(1, num_reqs, NUM_NODES, kinds=("tree",))
    case.seq_lens[:] = CONTEXT + NUM_NODES + 1
    case.prepare()
    if not has_trees:
        case.base.fill_(NO_TREE)
    pages = -(-(CONTEXT + NUM_NODES + 1) // PAGE)
    cache = torch.randn(num_reqs * pages, PAGE, KV_HEADS, 2 * HEAD_SIZE)
    table = torch.arange(num_reqs * pages, dtype=torch.int32).view(num_reqs, pages)
    return {
        "query": torch.randn(case.num_tokens, HEADS, HEAD_SIZE),
        "key_cache": cache[..., :HEAD_SIZE],
        "value_cache": cache[..., HEAD_SIZE:],
        "step": Step(
            query_start_loc=case.query_start_loc,
            seq_lens=case.seq_lens,
            block_table=table,
            positions=case.positions,
            ancestors=case.token_ancestors,
            base=case.base,
            max_query_len=NUM_NODES + 1,
        ),
    }


def bytes_of_vllm(tensors: dict[str, Any]) -> int:
    """What vLLM's Triton attention loads for the same queries as a chain."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    step, query = tensors["step"], tensors["query"]
    with counted_loads() as loaded:
        unified_attention(
            q=query,
            k=tensors["key_cache"],
            v=tensors["value_cache"],
            out=torch.empty_like(query),
            cu_seqlens_q=step.query_start_loc,
            max_seqlen_q=step.max_query_len,
            seqused_k=step.seq_lens,
            max_seqlen_k=CONTEXT + NUM_NODES + 1,
            softmax_scale=1.0,
            causal=True,
            window_size=(-1, -1),
            block_table=step.block_table,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
    return loaded[0]


def bytes_of_ours(tensors: dict[str, Any]) -> int:
    with counted_loads() as loaded:
        tree_attention(out=torch.empty_like(tensors["query"]), scale=1.0, **tensors)
    return loaded[0]


@pytest.mark.parametrize("num_reqs", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_bytes_that_attention_reads(num_reqs: int) -> None:
    tree = bytes_of_ours(long_step(num_reqs, has_trees=True))
    causal = bytes_of_ours(long_step(num_reqs, has_trees=False))
    vllm = bytes_of_vllm(long_step(num_reqs, has_trees=False))
    once = num_reqs * CONTEXT * KV_HEADS * 2 * HEAD_SIZE * 4
    print(f"\nbatch {num_reqs}: tree {tree}, causal {causal}, vLLM's {vllm}, context once {once}")
    assert tree <= 1.05 * causal
    assert tree <= 1.05 * vllm


@pytest.fixture
def counts(
    engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, Any], int], tuple[Calls, int]]:
    """Count what our hooks call in the steps with drafts; and these steps."""
    from vllm_medusa.plugin.worker.v2 import runner, sampler, speculator

    calls, steps = Calls(), [0]

    def counted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with calls:
                return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    original_prepare = runner.TreeRunnerMixin.prepare_attn

    def begins_step(self: Any, input_batch: Any) -> Any:
        if input_batch.num_draft_tokens > 0:
            if steps[0] == 0:  # what the prompts' step did does not count
                calls.kernels.clear()
                calls.operations.clear()
            steps[0] += 1
        return original_prepare(self, input_batch)

    def count(speculative_config: dict[str, Any], num_reqs: int) -> tuple[Calls, int]:
        prompts = [{"prompt_token_ids": [7 + i, 8, 9]} for i in range(num_reqs)]
        with engine(speculative_config=speculative_config) as llm:
            wanted = greedy(llm, prompts, 4)
            counted(sampler.TreeSampler, "__call__")
            counted(speculator.TreeSpeculator, "propose")
            counted(runner.TreeRunnerMixin, "_compact")
            counted(runner.TreeRunnerMixin, "_prepare_trees")
            monkeypatch.setattr(runner.TreeRunnerMixin, "prepare_attn", begins_step)
            with calls.kernels_counted():
                assert greedy(llm, prompts, 4) == wanted
        return calls, steps[0]

    return count


OURS = [
    "_prepare_kernel",
    "attention_kernel",
    "_accept_kernel",
    "_compact_kernel",
    "_set_trees_kernel",
]
NUM_LAYERS = 2


def check(name: str, calls: Calls, steps: int, kernels: list[str]) -> None:
    """Each kernel is launched once a step, attention once a layer, and nothing waits."""
    launched = {kernel: calls.kernels[kernel] / steps for kernel in kernels}
    per_step = sum(calls.operations.values()) / steps
    print(f"\n{name}, {steps} steps: {launched}, {per_step:.1f} operations of torch")
    assert steps > 1
    assert launched.pop("attention_kernel") == NUM_LAYERS
    assert set(launched.values()) == {1}
    assert calls.waits == []


@pytest.mark.parametrize("num_reqs", [1, 8])
def test_kernels_and_waits_of_a_step(counts: Any, tiny_heads: Path, num_reqs: int) -> None:
    """Beside vLLM's own step: four launches, one attention for each layer, no wait."""
    check(f"batch {num_reqs}", *counts(spec(tiny_heads, NUM_NODES), num_reqs), OURS)


@pytest.mark.parametrize("heads", ["tiny_heads", "seeing_heads", "prefix_heads", "recurrent_heads"])
def test_dynamic_trees_take_one_kernel_more(
    counts: Any, heads: str, request: pytest.FixtureRequest
) -> None:
    """And no wait; with a selector, which has operations for each depth, or a layer before too."""
    counted = counts(dynamic(request.getfixturevalue(heads)), 2)
    check(heads, *counted, [*OURS, "_best_first_kernel"])


@contextmanager
def whole_steps_counted(num_reqs: int) -> Iterator[tuple[Calls, list[int]]]:
    """Count all that the model runner calls in the steps in which so many requests have drafts."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    calls, steps, counts = Calls(), [0], False
    originals = GPUModelRunner.execute_model, GPUModelRunner.sample_tokens

    def counted(original: Any, *args: Any, **kwargs: Any) -> Any:
        if not counts:
            return original(*args, **kwargs)
        with calls, calls.kernels_counted():
            return original(*args, **kwargs)

    def execute_model(self: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal counts
        counts = len(output.scheduled_spec_decode_tokens) == num_reqs
        steps[0] += counts
        return counted(originals[0], self, output, *args, **kwargs)

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        return counted(originals[1], self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPUModelRunner, "execute_model", execute_model)
        patch.setattr(GPUModelRunner, "sample_tokens", sample_tokens)
        yield calls, steps


@contextmanager
def triton_attention_everywhere() -> Iterator[None]:
    """The Triton backend without trees too, so that attention counts alike."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def chosen(cls: Any, *args: Any, **kwargs: Any) -> str:
        return AttentionBackendEnum.TRITON_ATTN.get_path()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(chosen))
        yield


@pytest.mark.parametrize("num_reqs", [1, 8])
def test_whole_steps_beside_vllms_own_chains(
    engine: Callable[..., Any], tiny_model: Path, tiny_heads: Path, num_reqs: int
) -> None:
    """vLLM has no Medusa on this runner; it has n-gram lookup and draft models."""
    ngram = {"method": "ngram_gpu", "prompt_lookup_min": 2, "prompt_lookup_max": 3}
    all_settings = {
        "tree of 16": spec(tiny_heads, NUM_NODES),
        "n-gram chain of 16": {**ngram, "num_speculative_tokens": NUM_NODES},
        "draft model's chain of 4": {
            "method": "draft_model",
            "model": str(tiny_model),
            "num_speculative_tokens": 4,
        },
    }
    prompts = [{"prompt_token_ids": [7 + i, 8, 9]} for i in range(num_reqs)]
    found = {}
    for name, settings in all_settings.items():
        with (
            triton_attention_everywhere(),
            engine(speculative_config=settings) as llm,
            whole_steps_counted(num_reqs) as (calls, steps),
        ):
            greedy(llm, prompts, 7)
        kernels = sum(calls.kernels.values()) / steps[0]
        found[name] = kernels + calls.num_launches / steps[0]
        print(f"\nbatch {num_reqs}, {name}, {steps[0]} steps: {kernels:.1f} kernels of Triton,")
        print(f"{calls.num_launches / steps[0]:.1f} of torch; waits {calls.waits}")
        print(dict(calls.kernels))
    assert found["tree of 16"] < found["draft model's chain of 4"]
