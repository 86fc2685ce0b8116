"""Loops over nodes, compiled by numba, which vLLM's own n-gram drafter uses too.

A tree has a few dozen nodes, so in numpy the calls would cost more than their work. The compiled
code is kept beside this file, or in the user's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite.binding import ffi
from numba import njit

from vllm_medusa.draft.types import Floats, Ints

# When an engine starts, vLLM calls `vars()` on every object of every module
# (`triton_utils/dispatcher.py` of 0.32). The library object of llvmlite, with which numba compiles,
# returns one of its functions, and a second engine in this process would not start. So it gets an
# empty `__dict__` here.
ffi.lib._fntab.setdefault("__dict__", {})

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile a function of arrays and numbers when it is first called."""
    dispatcher: _Function = njit(cache=True, nogil=True)(function)
    return dispatcher


@compiled
def along_paths(parents: Ints, given: Floats) -> Floats:
    """Return [n] the product of numbers [n] along each node's path.

    Args:
        parents: [n] place of each node's parent, which comes before it; -1 is a root.
        given: [n].

    """
    paths = given.copy()
    for node in range(len(paths)):
        if parents[node] >= 0:
            paths[node] *= paths[parents[node]]
    return paths
