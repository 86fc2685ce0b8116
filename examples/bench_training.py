"""Measure what a training step costs beside the target's own forward pass, and its peak memory.

    python examples/bench_training.py --out docs/benchmarks/training.json

The demo model is tiny, and its vocabulary a fourth of its weights; `inflate` gives it the size,
and so the share of the vocabulary, of real ones: 15 M parameters have about the share of Llama 3 8B
(7 %), 50 M that of Llama 2 7B (2 %). Steps and forward passes take turns on the same batch, in one
thread; times are that thread's CPU time. The peak memory of each form of the loss is that of a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from inflate import inflate
from transformers import AutoModelForCausalLM

from vllm_medusa.data.rows import Row
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.loss import accumulate_gradients, draw_learnt
from vllm_medusa.training.model import TrainableHeads
from vllm_medusa.training.optimizer import HeadsOptimizer
from vllm_medusa.training.packing import Batch, Batches
from vllm_medusa.training.settings import TrainSettings

PROMPT_TOKENS, ANSWER_TOKENS = 64, 128
VARIANTS: dict[str, dict[str, Any]] = {
    "shared lm_head, KL": {},
    "shared lm_head, cross entropy": {"loss": "ce"},
    "low-rank lm_head (64), KL": {"lm_head": "low-rank", "rank": 64},
    "own lm_heads, KL": {"lm_head": "own"},
    "shared lm_head, KL, half of the positions": {"loss_positions": 0.5},
    "shared lm_head, KL, a quarter of the positions": {"loss_positions": 0.25},
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--millions", type=float, nargs="*", default=[15, 50, 150])
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "machine": {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__},
        "dtype": args.dtype,
        "batch_tokens": args.batch_tokens,
        "answer_share": round(ANSWER_TOKENS / (PROMPT_TOKENS + ANSWER_TOKENS), 3),
        "rounds": args.rounds,
        "memory": measure_memory(args),
        "steps": [measure_steps(args, millions) for millions in (None, *args.millions)],
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def load(args: argparse.Namespace, millions: float | None) -> FrozenTarget:
    """The demo model, inflated or as it is."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if millions is not None:
        model = inflate(model, millions * 1e6)
    return FrozenTarget(model.to(getattr(torch, args.dtype)))


def build(target: FrozenTarget, args: argparse.Namespace, **changes: Any) -> tuple[Any, ...]:
    """Settings, heads, optimizer and a batch of random rows shaped like distilled ones."""
    settings = TrainSettings(
        model=str(args.model), data="", steps=1, dtype=args.dtype, lr=1e-5, **changes
    )
    rng = np.random.default_rng(0)
    length = PROMPT_TOKENS + ANSWER_TOKENS
    documents = [
        Row(
            "",
            rng.integers(0, target.vocab_size, length).astype(np.int32),
            np.arange(length) >= PROMPT_TOKENS,
        )
        for _ in range(max(1, args.batch_tokens // length))
    ]
    batches = Batches(documents, args.batch_tokens, seed=0)
    batch = batches.build(next(batches.from_batch(0)))
    heads = TrainableHeads(settings, target)
    return settings, heads, HeadsOptimizer(heads, settings), batch


def step_of(target: FrozenTarget, args: argparse.Namespace, **changes: Any) -> Callable[[], None]:
    """A training step with the given settings."""
    settings, heads, optimizer, whole = build(target, args, **changes)
    count = round(settings.loss_positions * len(whole.learnt))

    def step() -> None:
        batch = draw_learnt(whole, count, [0]) if count < len(whole.learnt) else whole
        accumulate_gradients(heads, target, batch, settings, 1 / count)
        optimizer.step(1.0)

    return step


def measure_steps(args: argparse.Namespace, millions: float | None) -> dict[str, Any]:
    """Time forward passes and steps in turns; ratios are taken within each round."""
    target = load(args, millions)
    batch = build(target, args)[-1]

    @torch.no_grad()
    def forward() -> None:
        target.model(input_ids=batch.tokens, position_ids=batch.position_ids, use_cache=False)

    runs = {"forward": forward}
    runs |= {name: step_of(target, args, **changes) for name, changes in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if number:  # the first round warms up
                times[name].append(time.process_time() - started)
    num_tokens = batch.tokens.numel()
    parameters = target.model.num_parameters()
    seconds = statistics.median(times["forward"])
    vocabulary = target.weight.numel() / parameters
    print(
        f"\n{parameters / 1e6:.0f} M parameters, {vocabulary:.1%} of them the vocabulary: forward "
        f"{num_tokens / seconds:,.0f} tokens/s"
    )
    figures = {}
    for name in VARIANTS:
        pairs = zip(times[name], times["forward"], strict=True)
        ratios = [step / forward for step, forward in pairs]
        figures[name] = {
            "times_forward": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "tokens_per_second": round(num_tokens / statistics.median(times[name])),
        }
        print(f"  {figures[name]['times_forward']:6.2f} x  {name}", flush=True)
    return {
        "parameters": parameters,
        "vocabulary_share": round(vocabulary, 4),
        "forward_tokens_per_second": round(num_tokens / seconds),
        "training": figures,
    }


def unchunked_step(
    target: FrozenTarget, heads: TrainableHeads, batch: Batch, settings: TrainSettings
) -> None:
    """The plain form: all heads' logits at once, and autograd."""
    hidden = target.hidden(batch.tokens, batch.position_ids).flatten(0, 1)
    wanted = torch.softmax(target.logits(hidden[batch.learnt]).float(), dim=-1)
    features = heads.features(hidden, batch.tokens.flatten().roll(-1))
    losses = []
    for k in range(heads.num_heads):
        logits = heads.logits(features[k, batch.learnt - 1 - k], k).float()
        losses.append(-(wanted * F.log_softmax(logits, dim=-1)).sum() * settings.decay**k)
    (sum(losses) / len(batch.learnt)).backward()


def peak_memory(kind: str, args: argparse.Namespace, pipe: Any) -> None:
    """In a process of its own: take one step, send the peak of the resident set in MiB."""
    torch.set_num_threads(1)
    target = load(args, None)
    settings, heads, _, batch = build(target, args)
    if kind == "forward alone":
        target.hidden(batch.tokens, batch.position_ids)
    elif kind == "chunked":
        accumulate_gradients(heads, target, batch, settings, 1 / len(batch.learnt))
    else:
        unchunked_step(target, heads, batch, settings)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak resident set of one step of each form, in MiB; with a batch four times as large."""
    large = argparse.Namespace(**{**vars(args), "batch_tokens": 4 * args.batch_tokens})
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for kind in ("forward alone", "chunked", "unchunked"):
        ours, theirs = context.Pipe()
        process = context.Process(target=peak_memory, args=(kind, large, theirs))
        process.start()
        peaks[kind] = round(ours.recv())
        process.join()
        print(f"peak memory, {large.batch_tokens} tokens, {kind}: {peaks[kind]} MiB", flush=True)
    return {"batch_tokens": large.batch_tokens, **peaks}


if __name__ == "__main__":
    main()
