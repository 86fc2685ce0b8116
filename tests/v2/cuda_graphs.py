"""What stands for CUDA graphs on a CPU: operations recorded with their tensors, and replayed.

As with a graph, all that Python decided is frozen when it is replayed, and so are the tensors: what
is not in them anew is old. vLLM's own managers of graphs capture and replay these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

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
        num_replays: of this graph.

    """

    def __init__(self) -> None:
        self.operations: list[Callable[[], None]] = []
        self.num_replays = 0

    @torch.inference_mode()
    def replay(self) -> None:
        for operation in self.operations:
            operation()
        self.num_replays += 1


class _Recording(TorchDispatchMode):
    """Records into a graph what torch and Triton run while it is on."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph
        self._is_in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._is_in_kernel:
            return result
        name = func.overloadpacket.__name__
        assert not any(wait in name for wait in WAITS), f"{name} waits for the device"
        kept = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

        def again() -> None:
            found = [
                leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)
            ]
            for old, new in zip(kept, found, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self._graph.operations.append(again)
        return result

    @contextmanager
    def with_kernels(self) -> Iterator[None]:
        original = interpreter.GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            def again() -> None:
                original(executor, *args, **kwargs)

            self._graph.operations.append(again)
            self._is_in_kernel = True
            try:
                return original(executor, *args, **kwargs)
            finally:
                self._is_in_kernel = False

        with pytest.MonkeyPatch.context() as patch, self:
            patch.setattr(interpreter.GridExecutor, "__call__", launch)
            yield


@contextmanager
def cuda_graphs() -> Iterator[None]:
    """Let vLLM's managers of graphs capture on a CPU."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import cudagraph_utils

    @contextmanager
    def capture(graph: Graph, pool: Any, *, stream: Any) -> Iterator[None]:
        with _Recording(graph).with_kernels():
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(cudagraph_utils, "graph_capture", lambda **_: nullcontext())
        patch.setattr(cudagraph_utils, "capture_pool", lambda *_: nullcontext())
        patch.setattr(cudagraph_utils, "current_stream", SimpleNamespace)
        patch.setattr(type(current_platform), "_global_graph_pool", (0, 0))
        yield
