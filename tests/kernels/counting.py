"""What the interpreter sees: kernels launched, bytes loaded, and waits for the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

# Operations of torch that read a value of the device, or whose result's shape depends on one.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


@contextmanager
def counted_loads() -> Iterator[list[int]]:
    """Yield a list whose first element grows by the bytes that kernels load."""
    total = [0]
    builder = interpreter.InterpreterBuilder
    original = builder.create_masked_load

    def load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        total[0] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return original(self, ptrs, mask, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", load)
        yield total


class Calls(TorchDispatchMode):
    """Counts operations of torch, and kernels, while it is on; what a kernel does does not count.

    Attributes:
        operations: how often each operation of torch was called.
        num_launches: number of these that compute something: neither a view nor memory for later.
        kernels: how often each kernel was launched.

    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.num_launches = 0
        self._is_in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._is_in_kernel:
            name = func.overloadpacket.__name__
            self.operations[name] += 1
            self.num_launches += not (func.is_view or name.startswith(("empty", "new_empty")))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def kernels_counted(self) -> Iterator[None]:
        """Count launches too."""
        original = interpreter.GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.kernels[executor.fn.__name__] += 1
            self._is_in_kernel = True
            try:
                return original(executor, *args, **kwargs)
            finally:
                self._is_in_kernel = False

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interpreter.GridExecutor, "__call__", launch)
            yield

    @property
    def waits(self) -> list[str]:
        """Operations that wait for the device."""
        return [name for name in self.operations if any(wait in name for wait in WAITS)]
