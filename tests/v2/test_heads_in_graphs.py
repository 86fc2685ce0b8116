"""The heads draft in CUDA graphs of their own what they draft without.

vLLM's own manager captures and replays them; see `cuda_graphs` for what stands for graphs here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from tests.integration.conftest import greedy
from tests.v2.conftest import IS_INTERPRETED
from tests.v2.cuda_graphs import cuda_graphs
from tests.v2.trees import dynamic, spec

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="stands for CUDA graphs on a CPU")

SIZES = [1, 2, 4]


@contextmanager
def drafts_recorded() -> Iterator[list[tuple[list[Any], list[Any]]]]:
    """Parents and tokens that each step drafted, in all engines of this process."""
    from vllm_medusa.plugin.worker.v2 import speculator

    drafts: list[tuple[list[Any], list[Any]]] = []
    original = speculator.TreeSpeculator.propose

    def propose(self: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        tokens = original(self, input_batch, *args, **kwargs)
        if not kwargs.get("dummy_run"):
            parents = self.states.parents[input_batch.idx_mapping].tolist()
            drafts.append((parents, tokens.tolist()))
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculator.TreeSpeculator, "propose", propose)
        yield drafts


def capture(llm: Any) -> Any:
    """Capture the heads of an engine of this process; return its speculator."""
    from vllm.config.compilation import CUDAGraphMode

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    speculator = worker.model_runner.speculator
    compilation = llm.llm_engine.vllm_config.compilation_config
    compilation.cudagraph_capture_sizes = SIZES
    compilation.max_cudagraph_capture_size = SIZES[-1]
    speculator.init_cudagraph_manager(CUDAGraphMode.FULL_AND_PIECEWISE)
    assert speculator.cudagraph_manager.needs_capture()
    speculator.capture()
    return speculator


def run(llm: Any, prompts: list[Any]) -> list[list[int]]:
    """Batches of five requests, which is more than any graph has, of three, and of one."""
    return [
        text for batch in (prompts[:5], prompts[:3], prompts[:1]) for text in greedy(llm, batch, 4)
    ]


@pytest.mark.parametrize("heads", ["tiny_heads", "seeing_heads"])
@pytest.mark.parametrize("make", [spec, dynamic])
@pytest.mark.usefixtures("fast_attention")
def test_same_drafts(
    engine: Callable[..., Any],
    prompts: list[Any],
    make: Callable[..., Any],
    heads: str,
    request: pytest.FixtureRequest,
) -> None:
    settings = make(request.getfixturevalue(heads))
    with cuda_graphs(), drafts_recorded() as drafts, engine(speculative_config=settings) as llm:
        texts = run(llm, prompts)
        wanted = drafts[:]
        graphs = capture(llm).cudagraph_manager.graphs
        assert sorted(desc.num_reqs for desc in graphs) == SIZES
        drafts.clear()
        assert run(llm, prompts) == texts
        assert drafts == wanted
    replays = {desc.num_reqs: graph.num_replays for desc, graph in graphs.items()}
    # Three requests run in the graph of four. The batches of five run without.
    assert replays[1] > 1
    assert replays[4] > 1
    assert replays[1] + replays[2] + replays[4] < len(wanted)


@pytest.mark.usefixtures("fast_attention")
def test_buffers_made_anew_are_noticed(
    engine: Callable[..., Any], tiny_heads: Any, prompts: list[Any]
) -> None:
    settings = spec(tiny_heads)
    with cuda_graphs(), drafts_recorded() as drafts, engine(speculative_config=settings) as llm:
        texts = greedy(llm, prompts[:2], 4)
        wanted = drafts[:]
        speculator = capture(llm)
        drafts.clear()
        fields = vars(speculator._buffers).items()
        anew = {name: tensor.clone() for name, tensor in fields if name != "tokens"}
        speculator._buffers = dataclasses.replace(speculator._buffers, **anew)
        assert greedy(llm, prompts[:2], 4) == texts
        assert drafts != wanted


@pytest.mark.usefixtures("fast_attention")
def test_no_graphs_where_steps_have_none(engine: Callable[..., Any], tiny_heads: Any) -> None:
    from vllm.config.compilation import CUDAGraphMode

    with cuda_graphs(), engine(speculative_config=spec(tiny_heads)) as llm:
        speculator = capture(llm)
        for mode in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE):
            speculator.init_cudagraph_manager(mode)
            assert not speculator.cudagraph_manager.needs_capture()
