"""Steps and heads in CUDA graphs, token for token: vLLM captures and replays, on a CPU.

See `cuda_graphs` for what stands for graphs here, and for what it does not have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.integration.conftest import greedy, spec_metrics
from tests.v2.conftest import IS_INTERPRETED
from tests.v2.cuda_graphs import as_kernel, capture_steps, cuda_graphs, runner_of
from tests.v2.flash import flash_attention
from tests.v2.flashinfer import flashinfer_attention
from tests.v2.oracle import oracle
from tests.v2.trees import dynamic, spec

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="stands for CUDA graphs on a CPU")

SIZES = [1, 2, 4]


@pytest.fixture
def attention_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by torch in place of the kernel, one kernel in a graph."""
    from tests.v2 import interpreter
    from vllm_medusa.plugin.worker.v2 import attention

    monkeypatch.setattr(attention, "tree_attention", as_kernel(interpreter.attend_with_torch()))


@contextmanager
def drafts_recorded() -> Iterator[list[tuple[list[Any], list[Any]]]]:
    """Parents and tokens that each step drafted, in all engines of this process."""
    from vllm_medusa.plugin.worker.v2 import speculator

    drafts: list[tuple[list[Any], list[Any]]] = []
    original = speculator.TreeSpeculator.propose

    def propose(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        tokens: Tensor = original(self, input_batch, *args, **kwargs)
        if not kwargs.get("dummy_run"):
            parents = self.states.parents[input_batch.idx_mapping].tolist()
            drafts.append((parents, tokens.tolist()))
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator.TreeSpeculator, "propose", propose)
        yield drafts


def run(llm: Any, prompts: list[Any]) -> list[list[int]]:
    """Batches of five requests, more than any graph has, of three, and of one."""
    batches = (prompts[:5], prompts[:3], prompts[:1])
    return [text for batch in batches for text in greedy(llm, batch, 4)]


def replays_of(manager: Any) -> dict[int, int]:
    """How often the graph of each number of requests was replayed."""
    return {desc.num_reqs: graph.num_replays for desc, graph in manager.graphs.items()}


@pytest.mark.parametrize("heads", ["tiny_heads", "seeing_heads"])
@pytest.mark.parametrize("make", [spec, dynamic])
@pytest.mark.usefixtures("attention_of_torch")
def test_drafts_of_graphs(
    engine: Callable[..., Any],
    prompts: list[Any],
    make: Callable[..., Any],
    heads: str,
    request: pytest.FixtureRequest,
) -> None:
    """Steps and heads in graphs draft what they draft without."""
    options = {"speculative_config": make(request.getfixturevalue(heads))}
    options["enable_prefix_caching"] = False  # another run would have other steps
    with cuda_graphs(), drafts_recorded() as drafts, engine(**options) as llm:
        texts = run(llm, prompts)
        wanted = drafts[:]
        drafts.clear()
        runner = capture_steps(llm, SIZES)
        assert run(llm, prompts) == texts
        assert drafts == wanted
        managers = runner.cudagraph_manager, runner.speculator.cudagraph_manager
        all_replays = [replays_of(manager) for manager in managers]
    for replays in all_replays:
        assert sorted(replays) == SIZES
        # Three requests run in the graph of four. The batches of five run without.
        assert replays[1] > 1
        assert replays[4] > 1
        assert sum(replays.values()) < len(wanted)


@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN", "FLASHINFER"])
@pytest.mark.usefixtures("attention_of_torch")
def test_text_of_graphs(
    engine: Callable[..., Any],
    tiny_heads: Path,
    prompts: list[Any],
    reference: list[list[int]],
    backend: str,
) -> None:
    """Trees accepted in graphs, among them those of a batch that its graph pads."""
    prompts, reference = prompts[:3], reference[:3]
    stand_ins: dict[str, Any] = {
        "TRITON_ATTN": nullcontext(),
        "FLASH_ATTN": flash_attention(3),
        "FLASHINFER": flashinfer_attention(),
    }
    with (
        cuda_graphs(),
        stand_ins[backend] as seen,
        oracle(prompts, reference),
        engine(attention_backend=backend, speculative_config=spec(tiny_heads)) as llm,
    ):
        runner = capture_steps(llm, SIZES)
        num_contexts = len(seen.contexts) if seen else 0
        assert greedy(llm, prompts, 24) == reference
        assert spec_metrics(llm)["num_accepted_tokens"] > 8 * len(prompts)
        if seen:
            assert num_contexts > 0
            assert len(seen.contexts) > num_contexts
        assert replays_of(runner.cudagraph_manager)[4] > 2


@pytest.mark.usefixtures("attention_of_torch")
def test_bases_made_anew_are_noticed(
    engine: Callable[..., Any],
    tiny_heads: Path,
    prompts: list[Any],
    reference: list[list[int]],
) -> None:
    """Without them trees are chains for attention."""
    prompts, reference = prompts[:3], reference[:3]
    settings = spec(tiny_heads)
    with cuda_graphs(), oracle(prompts, reference), engine(speculative_config=settings) as llm:
        runner = capture_steps(llm, SIZES)
        runner.trees.base = runner.trees.base.clone()
        assert greedy(llm, prompts, 24) != reference


@pytest.mark.parametrize("what", ["contexts", "hidden states"])
@pytest.mark.usefixtures("attention_of_torch")
def test_tensors_made_anew_are_noticed(
    engine: Callable[..., Any],
    tiny_heads: Path,
    prompts: list[Any],
    what: str,
) -> None:
    options = {"speculative_config": spec(tiny_heads), "enable_prefix_caching": False}
    with cuda_graphs(), flash_attention(3), drafts_recorded() as drafts, engine(**options) as llm:
        greedy(llm, prompts[:2], 6)
        wanted = drafts[:]
        drafts.clear()
        runner = capture_steps(llm, SIZES)
        if what == "contexts":
            runner.trees.context_lens = runner.trees.context_lens.clone()
        else:
            buffers = runner.speculator._buffers
            hidden_states = buffers.hidden_states.clone()
            runner.speculator._buffers = dataclasses.replace(buffers, hidden_states=hidden_states)
        greedy(llm, prompts[:2], 6)
        assert drafts != wanted


def test_no_graphs_where_steps_have_none(engine: Callable[..., Any], tiny_heads: Path) -> None:
    from vllm.config.compilation import CUDAGraphMode

    with cuda_graphs(), engine(speculative_config=spec(tiny_heads)) as llm:
        runner = runner_of(llm)
        runner.compilation_config.cudagraph_capture_sizes = SIZES
        runner.compilation_config.max_cudagraph_capture_size = SIZES[-1]
        for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL):
            runner.speculator.init_cudagraph_manager(mode)
            manager = runner.speculator.cudagraph_manager
            assert manager.needs_capture() == (mode == CUDAGraphMode.FULL)
