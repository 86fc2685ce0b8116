"""What stands for CUDA graphs on a CPU: operations recorded with their tensors, and replayed.

As with a graph, all that Python decided is frozen when it is replayed, and so are the addresses:
a tensor that a step made anew is not seen. vLLM's own managers of graphs capture and replay these.
What a GPU has beside that, streams and a pool of memory, is not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from tests.kernels.counting import WAITS


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``.

    Attributes:
        num_replays: how often it was replayed.

    """

    def __init__(self) -> None:
        self.operations: list[Callable[[], None]] = []
        self.num_replays = 0

    @torch.inference_mode()
    def replay(self) -> None:
        """Run all of it again, into the tensors that it wrote when it was recorded."""
        for operation in self.operations:
            operation()
        self.num_replays += 1


class _Recording(TorchDispatchMode):
    """Records into a graph what torch and Triton run while it is on."""

    now: ClassVar[_Recording | None] = None

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph
        self._is_in_kernel = False

    def __enter__(self) -> Any:
        _Recording.now = self
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        _Recording.now = None
        super().__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._is_in_kernel:
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        assert not any(wait in name for wait in WAITS), f"{name} waits for the device"
        return self._recorded(func, args, kwargs or {})

    def kernel(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run and record a kernel; what it does inside does not count."""
        if self._is_in_kernel:
            return func(*args, **kwargs)
        self._is_in_kernel = True
        try:
            return self._recorded(func, args, kwargs)
        finally:
            self._is_in_kernel = False

    def _recorded(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)

        def again() -> None:
            new_ones = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(result), new_ones, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self._graph.operations.append(again)
        return result


def as_kernel(func: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch that a graph holds as one kernel, for which it stands."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if _Recording.now is None:
            return func(*args, **kwargs)
        return _Recording.now.kernel(func, args, kwargs)

    return call


@contextmanager
def cuda_graphs() -> Iterator[None]:
    """Let vLLM's managers of graphs capture on a CPU."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    @contextmanager
    def capture(graph: Graph, pool: Any, *, stream: Any) -> Iterator[None]:
        with _Recording(graph):
            yield

    with pytest.MonkeyPatch.context() as patch:
        launch = as_kernel(interpreter.GridExecutor.__call__)
        patch.setattr(interpreter.GridExecutor, "__call__", lambda *args, **kw: launch(*args, **kw))
        write = as_kernel(triton_attn.triton_reshape_and_cache_flash)
        patch.setattr(triton_attn, "triton_reshape_and_cache_flash", write)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(model_runner, "lock_workspace", lambda: None)
        patch.setattr(cudagraph_utils, "graph_capture", lambda **_: nullcontext())
        patch.setattr(cudagraph_utils, "capture_pool", lambda *_: nullcontext())
        patch.setattr(cudagraph_utils, "current_stream", SimpleNamespace)
        patch.setattr(type(current_platform), "_global_graph_pool", (0, 0))
        yield


def runner_of(llm: Any) -> Any:
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def capture_steps(llm: Any, nums_reqs: Sequence[int]) -> Any:
    """Capture steps of so many requests, and the heads, as a GPU's start does.

    Returns:
        the model runner; its graphs are in ``cudagraph_manager``.

    """
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    runner = runner_of(llm)
    width = runner.decode_query_len
    sizes = sorted({*nums_reqs, *(num * width for num in nums_reqs)})
    runner.compilation_config.cudagraph_capture_sizes = sizes
    runner.compilation_config.max_cudagraph_capture_size = sizes[-1]
    for layer in runner.compilation_config.static_forward_context.values():
        # The custom operation that hides attention from the compiler would hide it here too.
        layer.use_direct_call = True
    mode = CUDAGraphMode.FULL_DECODE_ONLY
    runner.cudagraph_manager = ModelCudaGraphManager(
        runner.vllm_config, runner.device, mode, decode_query_len=width
    )
    runner.speculator.init_cudagraph_manager(mode)
    runner.capture_model()
    return runner
