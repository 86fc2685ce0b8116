#!/usr/bin/env python3
"""Train the demo's Medusa heads on a frozen base (Medusa-1).

Head k (from 0) at position t learns the base's own distribution of the token at t + 2 + k, on
text that the base itself wrote greedily and on real text. Hidden states are computed once and
cached. The heads have no lm_head of their own: the base's is used.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    DemoError,
    Progress,
    build_optimizers,
    encode_stream,
    keep_freed_memory,
    learning_rate_factor,
    provenance,
    read_corpus,
    write_json,
)
from heads import (
    build_heads,
    greedy_continue,
    hidden_states,
    load_model,
    save_heads,
)
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

GENERATION_BATCH = 128
# What the cached hidden states depend on, besides the weights.
CACHE_SETTINGS = ("greedy_sequences", "real_sequences", "prompt_tokens", "new_tokens", "seed")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--out", type=Path, default=Path("demo/heads"))
    parser.add_argument("--cache", type=Path, help="file to keep the hidden states in")
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--greedy-sequences", type=int, default=4480)
    parser.add_argument("--real-sequences", type=int, default=1920)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--muon-lr", type=float, default=6e-3, help="peak rate, matrices")
    parser.add_argument("--adamw-lr", type=float, default=4e-3, help="peak rate, biases")
    parser.add_argument(
        "--temperature", type=float, default=0.5, help="of the base's distribution that is learnt"
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.temperature <= 0:
        parser.error(f"--temperature {arguments.temperature}: must be above 0")
    if arguments.prompt_tokens + arguments.new_tokens <= arguments.num_heads + 1:
        parser.error("--prompt-tokens plus --new-tokens must exceed --num-heads by 2 or more")
    return arguments


def build_cache(model: PreTrainedModel, arguments: argparse.Namespace) -> torch.Tensor:
    """Hidden states of greedy and real text: float16 [sequences, positions, hidden]."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    stream = encode_stream(tokenizer, read_corpus()[0])
    generator = torch.Generator().manual_seed(arguments.seed)

    def windows(count: int, length: int) -> tuple[torch.Tensor, ...]:
        starts = torch.randint(len(stream) - length, (count, 1), generator=generator)
        return torch.split(stream[starts + torch.arange(length)], GENERATION_BATCH)

    num_positions = arguments.prompt_tokens + arguments.new_tokens - 1
    per_batch = GENERATION_BATCH * arguments.new_tokens
    prompts = windows(arguments.greedy_sequences, arguments.prompt_tokens)
    progress = Progress(len(prompts), "greedy tokens", per_batch, every=2)
    chunks = []
    for done, batch in enumerate(prompts, start=1):
        _, hidden = greedy_continue(model, batch, arguments.new_tokens)
        chunks.append(hidden.half())
        progress.update(done, "generating")
    for batch in windows(arguments.real_sequences, num_positions):
        chunks.append(hidden_states(model, batch).half())
    return torch.cat(chunks)


def cached_hidden(model: PreTrainedModel, arguments: argparse.Namespace) -> torch.Tensor:
    """The hidden states, from the cache file if there is one."""
    if arguments.cache is None:
        return build_cache(model, arguments)
    weights = (arguments.model / "model.safetensors").read_bytes()
    wanted = {name: getattr(arguments, name) for name in CACHE_SETTINGS}
    wanted["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    if not arguments.cache.exists():
        hidden = build_cache(model, arguments)
        torch.save({"settings": wanted, "hidden": hidden}, arguments.cache)
        return hidden
    stored = torch.load(arguments.cache, weights_only=True)
    for name, value in wanted.items():
        if stored["settings"][name] != value:
            raise DemoError(
                f"--cache {arguments.cache}: made with {name} {stored['settings'][name]}, "
                f"not {value}; remove the file"
            )
    cached: torch.Tensor = stored["hidden"]
    return cached


def train(
    heads: nn.ModuleList,
    lm_head: torch.Tensor,
    hidden: torch.Tensor,
    arguments: argparse.Namespace,
) -> None:
    """Minimise the weighted cross entropy to the base's distributions, head by head."""
    optimizers = build_optimizers(heads, arguments.muon_lr, arguments.adamw_lr, ())
    generator = torch.Generator().manual_seed(arguments.seed)
    # Every head sees the same positions, so that one compiled graph serves all of them.
    num_positions = hidden.shape[1] - len(heads)
    lm_head = lm_head.bfloat16()

    def target_of(states: torch.Tensor) -> torch.Tensor:
        logits = (states.bfloat16() @ lm_head.T).float()
        return torch.softmax(logits / arguments.temperature, dim=-1)

    def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = (output.bfloat16() @ lm_head.T).float()
        return -(target * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()

    if arguments.compile:
        target_of, loss_of = torch.compile(target_of), torch.compile(loss_of)
    per_step = arguments.batch * num_positions
    progress = Progress(arguments.steps, "positions", per_step, every=20)
    averages = torch.zeros(len(heads))
    for step in range(arguments.steps):
        rows = torch.randint(len(hidden), (arguments.batch,), generator=generator)
        states = hidden[rows].float()
        targets = target_of(states)
        for k, head in enumerate(heads):
            target = targets[:, k + 1 : k + 1 + num_positions]
            loss = loss_of(head(states[:, :num_positions]), target)
            (0.8**k * loss).backward()
            averages[k] += (loss.item() - averages[k]) * max(0.05, 1 / (step + 1))
        factor = learning_rate_factor(step, arguments.steps, warmup=20)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        shown = " ".join(f"{value:.3f}" for value in averages.tolist())
        progress.update(step + 1, f"loss {shown}")


def run(arguments: argparse.Namespace) -> None:
    """Cache, train and write."""
    keep_freed_memory()
    torch.manual_seed(arguments.seed)
    started = time.perf_counter()
    model = load_model(arguments.model)
    hidden = cached_hidden(model, arguments)
    heads = build_heads(arguments.num_heads, arguments.num_layers, model.config.hidden_size)
    train(heads, model.get_output_embeddings().weight, hidden, arguments)
    model_path = Path("..") / arguments.model.name
    save_heads(heads, model, model_path.as_posix(), arguments.out)
    facts = provenance(
        seed=arguments.seed,
        greedy_sequences=arguments.greedy_sequences,
        real_sequences=arguments.real_sequences,
        positions_cached=hidden.shape[0] * hidden.shape[1],
        positions_seen=arguments.steps * arguments.batch * (hidden.shape[1] - len(heads)),
        parameters=sum(parameter.numel() for parameter in heads.parameters()),
        seconds=round(time.perf_counter() - started),
    )
    write_json(arguments.out / "provenance.json", facts)
    print(f"{len(heads)} heads of {arguments.num_layers} layers written to {arguments.out}")


def main() -> int:
    """Run, with errors in one line."""
    try:
        run(parse_arguments())
    except (DemoError, OSError) as error:
        print(f"train_heads: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
