"""What a step costs: our chain against vLLM's own, and trees against chains of as many drafts.

Run it with `make bench`. Every variant is an engine in its own process; all take turns, round by
round, and every ratio is taken within a round, so that a machine whose speed drifts does not
decide. A step's time is the wall-clock time of ``LLMEngine.step`` while all requests decode.

(a) `chain` of 4 against the Medusa that vLLM 0.32 has built in, with the same heads: the demo's,
    whose lm_head is the target's, and the same with that as each head's own, as one for all heads,
    and as low-rank factors of it. vLLM gets the products of the factors: it knows no low rank.
(b) trees of 8, 16 and 32 drafts against a plain chain of as many drafts through the same code
    (`long_chains/` makes the chain that long).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

from vllm_medusa.bench.variants import VLLM_CHAIN, parse_variants, with_built_in_heads
from vllm_medusa.engines.engine import EngineProcess
from vllm_medusa.heads import HeadsCheckpoint, load_heads
from vllm_medusa.heads.io.write import save_heads, with_target_lm_head
from vllm_medusa.target.config import read_lm_head, read_target

ROOT = Path(__file__).resolve().parent.parent
MODEL, HEADS = ROOT / "demo" / "model", ROOT / "demo" / "medusa-heads"
#: Python imports the folder's `sitecustomize` at its start.
WITH_LONG_CHAINS = {
    "PYTHONPATH": os.pathsep.join(
        filter(None, (str(ROOT / "examples" / "long_chains"), os.environ.get("PYTHONPATH")))
    )
}
SIZES = (8, 16, 32)
LM_HEADS = ("target", "own", "common", "low_rank")
RANK = 64
PROMPT_TOKENS = 128


def main() -> None:
    """Run the comparisons and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default: 9)")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens a run (default: 64)")
    parser.add_argument("--lm-heads", nargs="*", choices=LM_HEADS, default=LM_HEADS, help="of (a)")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="of (b)")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="also write every round's figures here")
    args = parser.parse_args()
    results = []
    for lm_head in args.lm_heads:
        print(f"(a) step time of our chain of 4 over that of vLLM's built-in Medusa, {lm_head=}")
        with tempfile.TemporaryDirectory() as folder:
            results += compare(args, chains(lm_head, Path(folder)))
    for size in args.sizes:
        print(f"(b) step time of a tree of {size} drafts over that of a chain of {size}")
        long_chain = [[0] * depth for depth in range(1, size + 1)]
        medusa = {"method": "medusa", "model": str(HEADS)}
        results += compare(
            args,
            {
                f"chain-{size}": ({**medusa, "tree": long_chain}, WITH_LONG_CHAINS),
                f"tree-{size}": ({**medusa, "num_speculative_tokens": size}, {}),
            },
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def chains(lm_head: str, folder: Path) -> dict[str, tuple[dict[str, object], dict[str, str]]]:
    """Write the demo's heads with a kind of lm_heads; return the engines that draft with them."""
    ours = theirs = with_lm_heads(lm_head)
    if lm_head == "low_rank":
        factors = ours.tensors
        product = factors["lm_head.up"] @ factors["lm_head.down"]
        theirs = _replace(ours, "own", {"lm_head.weight": product})
    save_heads(ours, folder / "ours")
    save_heads(theirs, folder / "theirs")
    (_, chain) = parse_variants([f"{VLLM_CHAIN}={folder / 'theirs'}"], None)
    chain = with_built_in_heads(chain, str(MODEL), folder / "vllm")
    medusa = {"method": "medusa", "model": str(folder / "ours"), "tree": "chain"}
    return {
        f"vllm-chain {lm_head}": (chain.speculative, chain.environment),
        f"chain {lm_head}": (medusa, {}),
    }


def with_lm_heads(lm_head: str) -> HeadsCheckpoint:
    """Return the demo's heads with a kind of lm_heads, all made of the target's."""
    heads = load_heads(HEADS)
    weight = read_lm_head(read_target(str(MODEL)))
    num_heads = heads.spec.num_heads
    if lm_head == "common":
        return with_target_lm_head(heads, weight)
    if lm_head == "own":
        return _replace(heads, lm_head, {"lm_head.weight": weight.expand(num_heads, -1, -1)})
    if lm_head == "low_rank":
        up, scale, down = torch.linalg.svd(weight.float(), full_matrices=False)
        factors = {"up": up[:, :RANK] * scale[:RANK], "down": down[:RANK]}
        return _replace(
            heads,
            lm_head,
            {
                f"lm_head.{name}": factor.to(weight.dtype).expand(num_heads, -1, -1)
                for name, factor in factors.items()
            },
        )
    return heads


def _replace(
    heads: HeadsCheckpoint, lm_head: str, tensors: dict[str, torch.Tensor]
) -> HeadsCheckpoint:
    blocks = {name: heads.tensors[name] for name in heads.tensors if name.startswith("blocks.")}
    spec = dataclasses.replace(heads.spec, lm_head=lm_head)
    return dataclasses.replace(heads, spec=spec, tensors=blocks | tensors)


def compare(
    args: argparse.Namespace, variants: dict[str, tuple[dict[str, object], dict[str, str]]]
) -> list[dict[str, object]]:
    """Time two variants in turns; print and return the figures of each batch size."""
    options = {
        "model": str(MODEL),
        "dtype": args.dtype,
        "max_model_len": 1024,
        "enforce_eager": True,
        "block_size": args.block_size,
        "kv_cache_memory_bytes": 2**29,
        "enable_prefix_caching": False,
    }
    rows = []
    with ExitStack() as stack:
        engines = {}
        for name, (speculative, environment) in variants.items():
            engines[name] = stack.enter_context(
                EngineProcess(
                    {**options, "speculative_config": speculative},
                    {"OMP_NUM_THREADS": "1", **environment},
                )
            )
        for engine in engines.values():
            engine.wait()
        for batch_size in args.batch_sizes:
            rows.append(measure(engines, batch_size, args.rounds, args.max_tokens))
    return rows


def measure(
    engines: dict[str, EngineProcess], batch_size: int, rounds: int, max_tokens: int
) -> dict[str, object]:
    """Time one batch size; the second variant over the first, round by round."""
    prompts = make_prompts(batch_size)
    for engine in engines.values():
        engine.run(prompts, max_tokens, ignore_eos=True)
    times: dict[str, list[float]] = {name: [] for name in engines}
    tokens_per_step = {}
    for _ in range(rounds):
        for name, engine in engines.items():
            run = engine.run(prompts, max_tokens, ignore_eos=True)
            times[name].append(statistics.median(decode_steps(run.step_ms)))
            tokens_per_step[name] = run.tokens_per_step
    base, other = engines
    ratios = [b / a for a, b in zip(times[base], times[other], strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"  batch {batch_size:2}: {base} {statistics.median(times[base]):6.2f} ms "
        f"({tokens_per_step[base]:.2f} tokens/step), "
        f"{other} {statistics.median(times[other]):6.2f} ms "
        f"({tokens_per_step[other]:.2f} tokens/step), "
        f"ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f} over {rounds} rounds)",
        flush=True,
    )
    return {
        "batch_size": batch_size,
        "step_ms": times,
        "tokens_per_step": tokens_per_step,
        "ratio": ratio,
    }


def decode_steps(step_ms: list[float]) -> list[float]:
    """Leave out the prompts' step and the last third, where the first requests have ended."""
    return step_ms[1 : max(2, len(step_ms) * 2 // 3)]


def make_prompts(count: int) -> list[list[int]]:
    """Token ids of equally long pieces of the demo's held-out prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lines = (ROOT / "demo" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["prompt"] for line in lines)
    ids = tokenizer(text, verbose=False)["input_ids"]
    return [ids[i * PROMPT_TOKENS : (i + 1) * PROMPT_TOKENS] for i in range(count)]


if __name__ == "__main__":
    main()
