"""Compile every kernel for GPUs that are not there.

    TRITON_INTERPRET=0 python -m tests.kernels.compile_for_gpu 80 90 100

Triton's compiler needs no GPU. Each launch of the kernels' wrappers is caught and compiled for each
architecture, down to its machine code, in place of being run.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.kernels.cases import Case, numbers, random_case
from vllm_medusa.kernels.accept import accept
from vllm_medusa.kernels.attention import Features, Scales, Step, Workspace, tree_attention
from vllm_medusa.kernels.best_first import RankPaths, best_first
from vllm_medusa.kernels.compact import CacheGroup, compact
from vllm_medusa.kernels.constraints import apply_bad_words, apply_penalties
from vllm_medusa.kernels.trees import set_trees
from vllm_medusa.kernels.typical import take_typical

TARGETS = [GPUTarget("cuda", int(capability), 32) for capability in sys.argv[1:]]
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bool: "i1",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}
compiled: set[str] = set()


def type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands for ``JITFunction.run``."""
    options = {key: kwargs.pop(key) for key in ("num_warps",) if key in kwargs}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    constants = {
        (i,): values[name]
        for i, name in enumerate(kernel.arg_names)
        if kernel.params[i].is_constexpr
    }
    # As Triton does: an integer of one is a constant, also where it is no constant by its name.
    constants |= {
        (i,): 1
        for i, name in enumerate(kernel.arg_names)
        if (i,) not in constants and type(values[name]) is int and values[name] == 1
    }
    signature = {
        name: "constexpr" if (i,) in constants else type_of(values[name])
        for i, name in enumerate(kernel.arg_names)
    }
    for target in TARGETS:
        if target.arch < 89 and any("fp8" in kind for kind in signature.values()):
            continue
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        binary = triton.compile(source, target=target, options=options)
        assert binary.asm["cubin"]
        compiled.add(f"{kernel.__name__} for sm_{target.arch}")


def compile_small_kernels(case: Case) -> None:
    rows = sum(case.num_logits)
    states = [case.parents, case.depths, case.ancestors]
    set_trees(*states, case.parents, case.idx_mapping)
    case.prepare()
    log_probs = torch.zeros(4, case.num_reqs, 10)
    for num_paths in (3, 256):
        on_way = torch.zeros(4, num_paths, dtype=torch.int32)
        best_first(log_probs, log_probs.long(), RankPaths(on_way, on_way, on_way[0]), 16)
    tokens = torch.zeros(rows, dtype=torch.int64)
    for drafts in (tokens, tokens.int()):
        path, _, length = accept(
            case.parents, case.idx_mapping, case.base, drafts, tokens, case.cu_num_logits, 4
        )
        take_typical(
            *(tokens, (case.parents, case.depths, case.ancestors), case.idx_mapping, case.base),
            *(drafts, torch.zeros(rows), torch.zeros(rows, dtype=torch.bool), case.cu_num_logits),
        )
    for dtype, content in ((torch.bfloat16, 64), (torch.int8, 33)):
        groups = CacheGroup.build([torch.zeros(4, 2, 16, content, dtype=dtype)], [0])
        slots = torch.zeros(1, case.num_tokens, dtype=torch.int64)
        compact(groups, slots, case.logits_indices, case.cu_num_logits, path, length)
    index = torch.zeros(rows, dtype=torch.int32)
    logits = torch.zeros(rows, 9000)
    floats, mask = torch.zeros(5), torch.zeros(5, 282, dtype=torch.int32)
    counts = torch.zeros(5, 9000, dtype=torch.int32)
    apply_penalties(
        logits, index, index, index, case.ancestors, floats, floats, floats, mask, counts
    )
    states = [case.ancestors, case.depths]
    per_state = numbers([0] * 5)
    apply_bad_words(
        logits, index, index, index, *states, mask, mask, per_state, mask, per_state, per_state, 2
    )


def compile_attention(
    case: Case, cache_dtype: torch.dtype, features: Features, head_size: int, splits: int
) -> None:
    query_dtype = torch.bfloat16 if cache_dtype.itemsize == 1 else cache_dtype
    query = torch.zeros(case.num_tokens, 8, head_size, dtype=query_dtype)
    cache = torch.zeros(4, 16, 2, 2 * head_size).to(cache_dtype)
    table = torch.zeros(case.num_reqs, 8, dtype=torch.int32)
    step = Step(
        case.query_start_loc,
        case.seq_lens,
        table,
        case.positions,
        case.token_ancestors,
        case.base,
        max(case.query_lens),
    )
    workspace = Workspace.make(case.num_tokens * splits, 8, head_size, "cpu")
    lse = None if features.needs_positions else torch.zeros(8, case.num_tokens)
    for context_lse in (None, lse):
        tree_attention(
            query,
            cache[..., :head_size],
            cache[..., head_size:],
            torch.empty_like(query),
            step,
            1.0,
            features,
            workspace,
            10**6,
            context_lse,
        )


def main() -> None:
    JITFunction.run = compile_launch
    heads, pages = torch.zeros(8), torch.zeros(4, 16, 2)
    by_tensor, by_token = Scales(torch.ones(1), torch.ones(1)), Scales(pages, pages)
    all_of_it = Features(window=9, softcap=3.0, slopes=heads, slopes_of_root=True, sinks=heads)
    for num_reqs in (1, 3):
        case = random_case(1, num_reqs, 16, kinds=("tree",))
        compile_small_kernels(case)
        compile_attention(case, torch.bfloat16, Features(), 128, 1)
    compile_attention(case, torch.bfloat16, Features(), 128, 8)
    compile_attention(case, torch.float32, Features(), 64, 2)
    compile_attention(case, torch.float16, all_of_it, 80, 1)
    compile_attention(case, torch.bfloat16, all_of_it, 256, 4)
    compile_attention(case, torch.float8_e4m3fn, Features(scales=by_tensor), 128, 4)
    compile_attention(case, torch.float8_e4m3fn, Features(scales=by_token), 128, 1)
    compile_attention(case, torch.int8, Features(scales=by_token, slopes=heads), 128, 1)
    print(*sorted(compiled), sep="\n")


if __name__ == "__main__":
    main()
