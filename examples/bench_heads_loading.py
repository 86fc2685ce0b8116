"""What reading the heads costs: seconds and peak memory of the front end and of each rank.

Writes heads of random numbers (by default of Llama-3-8B's size: four heads, bfloat16, 4.3 GB) into
a temporary folder, then runs the plugin's part of an engine's processes: of the front end, which
makes the engine's configuration, of one rank that holds all rows of the lm_heads, and of two that
share them. No target model is loaded. The heads' file is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Write the heads, run the processes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--role", help=argparse.SUPPRESS)  # of a process that measures itself
    args = parser.parse_args()
    if args.role:
        run = run_front_end if args.role == "front end" else run_rank
        print(json.dumps(run(args.folder, args.role)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = write_files(folder, args.num_heads, args.hidden_size, args.vocab_size)
        print(f"heads of {size / 2**20:,.0f} MiB")
        print(f"{'process':<14} {'seconds':>8} {'before':>12} {'peak':>12}")
        for roles in (["front end"], ["rank 0 of 1"], ["rank 0 of 2", "rank 1 of 2"]):
            for role, found in zip(roles, measure(roles, folder), strict=True):
                before, peak = (f"{found[key] / 2**20:,.0f} MiB" for key in ("before", "peak"))
                print(f"{role:<14} {found['seconds']:>8.2f} {before:>12} {peak:>12}", flush=True)


def write_files(folder: Path, num_heads: int, hidden_size: int, vocab_size: int) -> int:
    """Write the heads and the target's config.json; return the heads' bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        dtype="bfloat16",
    ).save_pretrained(folder)
    block = torch.randn(hidden_size, hidden_size, dtype=torch.bfloat16)
    lm_head = torch.randn(vocab_size, hidden_size, dtype=torch.bfloat16)
    tensors = {f"{head}.0.linear.weight": block.clone() for head in range(num_heads)}
    tensors |= {f"{head}.1.weight": lm_head.clone() for head in range(num_heads)}
    path = folder / "heads" / "medusa_lm_head.safetensors"
    path.parent.mkdir()
    save_file(tensors, path)
    return path.stat().st_size


def measure(roles: list[str], folder: Path) -> list[dict[str, float]]:
    """Run processes side by side; return what each prints last."""
    command = [sys.executable, __file__, "--folder", str(folder), "--role"]
    running = [
        subprocess.Popen([*command, role], stdout=subprocess.PIPE, text=True) for role in roles
    ]
    printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a process failed; its message is above")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def run_front_end(folder: Path, _: str) -> dict[str, float]:
    """Make the configurations that the ranks read, the first one measured."""
    from vllm.engine.arg_utils import EngineArgs

    def create(num_ranks: int, **options: Any) -> None:
        config = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            max_model_len=512,
            tensor_parallel_size=num_ranks,
            distributed_executor_backend="mp",
            **options,
        ).create_engine_config()
        (folder / f"config-{num_ranks}.pickle").write_bytes(pickle.dumps(config))

    heads = {"method": "medusa", "model": str(folder / "heads"), "tree": "chain"}
    create(1)  # what vLLM imports and finds out once is not the heads'
    found = cost_of(lambda: create(1, speculative_config=heads))
    create(2, speculative_config=heads)
    return found


def run_rank(folder: Path, role: str) -> dict[str, float]:
    """Load a rank's share of the heads, on its share of the cores."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    from vllm_medusa.plugin.worker.proposer import MedusaProposer

    rank, num_ranks = int(role.split()[1]), int(role.split()[3])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    config = pickle.loads((folder / f"config-{num_ranks}.pickle").read_bytes())
    # vLLM's CPU worker sets it: with AVX-512 the ranks share memory of this name.
    os.environ.setdefault("VLLM_DIST_IDENT", folder.name)
    with set_current_vllm_config(config):
        init_distributed_environment(
            num_ranks, rank, f"file://{folder}/ranks-{num_ranks}", rank, "gloo"
        )
        initialize_model_parallel(num_ranks)
        proposer = MedusaProposer(config)
        found = cost_of(lambda: proposer.load_model(torch.nn.Module()))
    cleanup_dist_env_and_memory()
    return found


def cost_of(call: Callable[[], None]) -> dict[str, float]:
    """Seconds of a call, and resident bytes of this process before it and at most."""
    before = _memory("VmRSS")
    start = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start, "before": before, "peak": _memory("VmHWM")}


def _memory(what: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{what}:")[2].split()[0])


if __name__ == "__main__":
    main()
