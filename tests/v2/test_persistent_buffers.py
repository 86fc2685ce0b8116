"""What changes between the replays of a CUDA graph lies at the same address in every step.

No graph is captured in the interpreter. A graph replays the launches of one step with the addresses
of that step, so what is tested is that no later step launches with others.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.integration.conftest import greedy
from tests.v2.trees import dynamic, spec
from vllm_medusa import kernels

NUM_LAYERS = 2
#: What attention computes from and to; a graph has memory of its own for it.
ACTIVATIONS = {"query_ptr", "out_ptr"}
#: What a step changes and its forward pass reads.
OF_THE_STEP = {
    "block_table_ptr",
    "query_start_ptr",
    "seq_lens_ptr",
    "positions_ptr",
    "ancestors_ptr",
    "base_ptr",
}
#: What other kernels hand on to a later part of a step, or to the next step.
HANDED_ON = {
    "_set_trees_kernel": {"state_parents_ptr", "state_depths_ptr", "state_ancestors_ptr"},
    "_prepare_kernel": {
        *("positions_ptr", "ancestors_ptr", "base_ptr", "context_lens_ptr"),
        *("state_depths_ptr", "state_ancestors_ptr", "query_start_ptr", "seq_lens_ptr"),
    },
    "_accept_kernel": {"state_parents_ptr", "base_ptr"},
    "_compact_kernel": {"slots_ptr", "addresses_ptr", "slot_rows_ptr"},
}


@dataclasses.dataclass
class Launch:
    """A kernel and the tensors it was launched with, by the names of its arguments."""

    kernel: str
    tensors: dict[str, Tensor]


class Recorder:
    """Stands before a kernel; it keeps what it sees, so that no address is given out twice."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(self._kernel.arg_names, args, strict=False))
            tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
            self._launches.append(Launch(self._kernel.__name__, tensors))
            return self._kernel[grid](*args, **kwargs)

        return launch


@contextmanager
def launches_recorded() -> Iterator[list[Launch]]:
    """Record every launch of our kernels in this process."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
            module = importlib.import_module(found.name)
            for name, value in list(vars(module).items()):
                if name.endswith("kernel") and hasattr(value, "arg_names"):
                    patch.setattr(module, name, Recorder(value, launches))
        yield launches


def addresses(launches: list[Launch]) -> dict[tuple[str, int, str], set[int]]:
    """By kernel, layer and argument."""
    found: dict[tuple[str, int, str], set[int]] = defaultdict(set)
    counts: dict[str, int] = defaultdict(int)
    for launch in launches:
        is_attention = launch.kernel in ("attention_kernel", "merge_kernel")
        layer = counts[launch.kernel] % NUM_LAYERS if is_attention else 0
        counts[launch.kernel] += 1
        out = launch.tensors.get("out_ptr")
        for name, tensor in launch.tensors.items():
            # Of what a layer does not have the output stands in the place.
            if name in ACTIVATIONS or tensor is out:
                continue
            if is_attention or name in HANDED_ON.get(launch.kernel, ()):
                found[launch.kernel, layer, name].add(tensor.data_ptr())
    return found


def moved(launches: list[Launch]) -> set[tuple[str, str]]:
    """Kernels and arguments that had more than one address."""
    return {(kernel, name) for (kernel, _, name), at in addresses(launches).items() if len(at) > 1}


def run(engine: Callable[..., Any], settings: dict[str, Any]) -> list[Launch]:
    """Launches of two batches of unlike sizes."""
    prompts = [{"prompt_token_ids": [7 + i, 8, 9]} for i in range(2)]
    with engine(speculative_config=settings) as llm, launches_recorded() as launches:
        for batch in (prompts, prompts[:1]):
            greedy(llm, batch, 5)
    steps = sum(launch.kernel == "attention_kernel" for launch in launches) / NUM_LAYERS
    assert steps > 4
    return launches


@pytest.mark.parametrize("heads", ["tiny_heads", "seeing_heads"])
def test_every_step_launches_with_the_same_addresses(
    engine: Callable[..., Any], heads: str, request: pytest.FixtureRequest
) -> None:
    make = spec if heads == "tiny_heads" else dynamic
    launches = run(engine, make(request.getfixturevalue(heads)))
    found = addresses(launches)
    read = {name for kernel, _, name in found if kernel == "attention_kernel"}
    assert read >= OF_THE_STEP | {"key_ptr", "value_ptr", "part_ptr"}
    assert {kernel for kernel, _, _ in found} >= {"attention_kernel", *HANDED_ON}
    assert moved(launches) == set()
    # What is written is what is read.
    for name in OF_THE_STEP - {"block_table_ptr"}:
        assert found["_prepare_kernel", 0, name] == found["attention_kernel", 0, name]
    for name in ("state_depths_ptr", "state_ancestors_ptr"):
        assert found["_set_trees_kernel", 0, name] == found["_prepare_kernel", 0, name]
    assert (
        found["_set_trees_kernel", 0, "state_parents_ptr"]
        == (found["_accept_kernel", 0, "state_parents_ptr"])
    )


def test_tensors_made_anew_are_noticed(
    engine: Callable[..., Any],
    tiny_heads: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm_medusa.plugin.worker.v2 import attention

    original = attention.TreeBuilderMixin._metadata

    def metadata(self: Any, *args: Any) -> Any:
        made = original(self, *args)
        if made.step is not None:
            fields = vars(made.step).items()
            anew = {name: value.clone() for name, value in fields if isinstance(value, Tensor)}
            made.step = dataclasses.replace(made.step, **anew)
        return made

    monkeypatch.setattr(attention.TreeBuilderMixin, "_metadata", metadata)
    launches = run(engine, spec(tiny_heads))
    assert moved(launches) == {("attention_kernel", name) for name in OF_THE_STEP}
