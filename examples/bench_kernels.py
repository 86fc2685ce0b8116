"""What the kernels of a step with trees cost, on any machine with a GPU, torch and Triton.

    python examples/bench_kernels.py [--batch-sizes 1 8 32] [--contexts 512 2048] [--nodes 16 63]

vLLM is not needed. Attention to trees is timed beside the same kernel without trees and torch's own
attention of as many causal queries over contiguous keys, and the small kernels of a step by
themselves. "own keys" is attention to trees whose context FlashAttention attends to, without what
that takes. Times are medians in microseconds. Without a GPU, with TRITON_INTERPRET=1, every kernel
runs once on a small case, so that it is known to run, and no time is shown.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from vllm_medusa.kernels import NO_TREE, trees
from vllm_medusa.kernels.accept import accept
from vllm_medusa.kernels.attention import Step, Workspace, tree_attention
from vllm_medusa.kernels.compact import CacheGroup, compact

PAGE = 16
MAX_DEPTH = 5


@dataclass(frozen=True)
class Shape:
    """Of a step and its model."""

    num_reqs: int
    context: int
    num_nodes: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_layers: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the model; the interpreter cannot multiply bfloat16."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def queries(self) -> int:
        """Of one request: its root and drafts."""
        return self.num_nodes + 1


class Tensors:
    """A step of requests that all run a whole tree."""

    def __init__(self, shape: Shape) -> None:
        rng, device = random.Random(0), shape.device
        reqs, width = shape.num_reqs, shape.queries
        parents = [0, *(rng.randrange(max(0, i - 4), i) for i in range(1, width))]
        self.parents = torch.tensor([parents] * reqs, device=device)
        self.states = [torch.zeros_like(self.parents) for _ in range(3)]
        self.index = torch.arange(reqs, dtype=torch.int32, device=device)
        self.starts = torch.arange(reqs + 1, dtype=torch.int32, device=device) * width
        self.seq_lens = torch.full_like(self.index, shape.context + width)
        self.positions = torch.zeros(reqs * width, dtype=torch.int64, device=device)
        self.ancestors = torch.zeros_like(self.positions)
        self.base = torch.full_like(self.index, NO_TREE)
        self.no_tree = self.base.clone()
        self.context_lens = torch.zeros_like(self.base)
        self.prefill_len = torch.ones_like(self.index)
        self.tokens = torch.randint(2, self.positions.shape, device=device)
        self.rows = torch.arange(reqs * width, device=device)
        pages = -(-(shape.context + width) // PAGE)
        size = (shape.num_layers, reqs * pages, shape.num_kv_heads, PAGE, 2 * shape.head_size)
        self.caches = list(torch.randn(size, device=device, dtype=shape.dtype))
        self.table = torch.randperm(reqs * pages, device=device).view(reqs, pages).int()
        places = shape.context + torch.arange(width, device=device)
        slots = self.table[:, places // PAGE].long() * PAGE + places % PAGE
        self.slots = slots.flatten()[None]
        heads = (reqs * width, shape.num_heads, shape.head_size)
        self.query = torch.randn(heads, device=device, dtype=shape.dtype)
        self.out = torch.empty_like(self.query)
        self.groups = CacheGroup.build(self.caches, [0] * shape.num_layers)
        self.workspace = Workspace.make(2048, shape.num_heads, shape.head_size, device)
        self.max_query_len = width


def small_kernels(shape: Shape, t: Tensors) -> dict[str, Callable[[], object]]:
    """Each of them once, as a step runs it."""
    paths: list[Tensor] = []

    def run_accept() -> None:
        path, _, length = accept(
            t.states[0], t.index, t.base, t.tokens, t.tokens, t.starts, MAX_DEPTH
        )
        paths[:] = [path, length]

    return {
        "set_trees": lambda: trees.set_trees(*t.states, t.parents, t.index),
        "prepare": lambda: trees.prepare(
            t.positions,
            t.ancestors,
            t.base,
            t.context_lens,
            *t.states[1:],
            t.index,
            t.starts,
            t.seq_lens,
            t.starts,
            t.prefill_len,
        ),
        "accept": run_accept,
        "compact": lambda: compact(t.groups, t.slots, t.rows, t.starts, *paths),
    }


def attentions(shape: Shape, t: Tensors) -> dict[str, Callable[[], object]]:
    """Attention of one layer: trees, causal in the same kernel, torch's causal."""
    key, value = t.caches[0].transpose(1, 2).split(shape.head_size, dim=-1)
    processors = 1
    if shape.device == "cuda":
        processors = torch.cuda.get_device_properties(0).multi_processor_count

    def attend(base: Tensor, context_lse: Tensor | None = None) -> None:
        step = Step(t.starts, t.seq_lens, t.table, t.positions, t.ancestors, base, t.max_query_len)
        scale = shape.head_size**-0.5
        tree_attention(
            t.query, key, value, t.out, step, scale, workspace=t.workspace,
            wanted_programs=2 * processors, context_lse=context_lse,
        )  # fmt: skip

    lse = torch.zeros(shape.num_heads, len(t.query), device=shape.device)
    keys = shape.context + shape.queries
    size = (shape.num_reqs, shape.num_kv_heads, keys, shape.head_size)
    plain = [torch.randn(size, device=shape.device, dtype=shape.dtype) for _ in range(2)]
    queries = t.query.view(shape.num_reqs, shape.queries, shape.num_heads, -1).transpose(1, 2)
    # With a mask torch leaves its fast kernels; all queries see all keys, which costs as much.
    return {
        "tree": lambda: attend(t.base),
        "own keys": lambda: attend(t.base, lse),
        "causal": lambda: attend(t.no_tree),
        "torch": lambda: scaled_dot_product_attention(queries, *plain, enable_gqa=True),
    }


def run(shape: Shape) -> None:
    """Time, or run once, and print a line."""
    tensors = Tensors(shape)
    functions = {**small_kernels(shape, tensors), **attentions(shape, tensors)}
    for function in functions.values():
        function()
    name = f"{shape.num_reqs:6} {shape.context:8} {shape.num_nodes:6}"
    if shape.device == "cpu":
        print(f"{name}  ran: {', '.join(functions)}")
        return
    times = {key: 1000 * do_bench(f, return_mode="median") for key, f in functions.items()}
    ratio = times["tree"] / times["causal"]
    print(name, *(f"{time:9.1f}" for time in times.values()), f"{ratio:11.3f}")


def main() -> None:
    """Go through the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 63])
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128],
                        metavar=("QUERY", "KV", "SIZE"))  # fmt: skip
    parser.add_argument("--layers", type=int, default=32, help="of whose caches accepted K/V moves")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        print("no GPU: each kernel runs once, in Triton's interpreter, on a small case")
        run(Shape(2, 64, 16, 4, 2, 32, 2, device))
        return
    print(f"{torch.cuda.get_device_name()}, Triton {triton.__version__}, microseconds")
    names = ["set_trees", "prepare", "accept", "compact", "tree"]
    names += ["own keys", "causal", "torch", "tree/causal"]
    print(" batch  context  nodes", *(f"{name:>9}" for name in names))
    for nodes in args.nodes:
        for context in args.contexts:
            for batch in args.batch_sizes:
                run(Shape(batch, context, nodes, *args.heads, args.layers, device))


if __name__ == "__main__":
    main()
