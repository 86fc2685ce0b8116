#!/usr/bin/env python3
"""Measure the demo's heads on held-out files and write their best draft trees.

Trees come from joint path statistics over greedy continuations of held-out text. Tokens per step
are then simulated exactly on the greedy continuations of the demo's prompts.

A continuation loops from its first 16-token run that it had already written before (the two may
overlap); "without loops" leaves out everything from there on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DemoError, Progress, encode_stream, provenance, read_corpus, require, write_json
from heads import greedy_continue, load_heads, load_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

RANK_CAP = 16  # ranks from here on count as a miss
LOOP_TOKENS = 16
TREE_SIZES = (8, 16, 24, 32, 48, 64)
WINDOW_BATCH = 64

TreePath = tuple[int, ...]
Ranks = list[list[int]]


@dataclass(frozen=True)
class Continuation:
    """The ranks [position][head] of the right tokens, and how many positions come before loops."""

    ranks: Ranks
    num_before_loop: int


@dataclass(frozen=True)
class Drafter:
    """What turns the target's hidden states into draft tokens, and the token that ends a text."""

    heads: nn.ModuleList
    lm_head: nn.Module
    eos_token_id: int


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--heads", type=Path, default=Path("demo/heads"))
    parser.add_argument("--prompts", type=Path, default=Path("demo/prompts.jsonl"))
    parser.add_argument("--windows", type=int, default=256, help="held-out windows for the trees")
    parser.add_argument("--window-tokens", type=int, default=96, help="prompt tokens a window")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--tree-nodes", type=int, default=64, help="draft nodes to write")
    parser.add_argument("--dry-run", action="store_true", help="print only, write nothing")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def loop_start(tokens: list[int]) -> int:
    """Index of the first token of the first run that was already written before."""
    seen: set[TreePath] = set()
    for start in range(len(tokens) - LOOP_TOKENS + 1):
        run = tuple(tokens[start : start + LOOP_TOKENS])
        if run in seen:
            return start
        seen.add(run)
    return len(tokens)


def rank_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Number of tokens ranked above the target, capped: [..., vocab], [...] -> [...]."""
    target_logits = logits.gather(-1, targets.unsqueeze(-1))
    return (logits > target_logits).sum(dim=-1).clamp(max=RANK_CAP)


@torch.no_grad()
def continuation_of(
    tokens: torch.Tensor, hidden: torch.Tensor, num_prompt: int, drafter: Drafter
) -> Continuation:
    """Ranks along one greedy continuation: tokens [n], hidden states [n - 1, hidden].

    Position p (from 0) drafts from the hidden state before generated token p, which is the root:
    head k guesses generated token p + 1 + k.
    """
    heads = drafter.heads
    generated = tokens[num_prompt:]
    ended = torch.nonzero(generated == drafter.eos_token_id)
    if len(ended):
        generated = generated[: int(ended[0]) + 1]
    num_positions = len(generated) - len(heads)
    if num_positions < 1:
        return Continuation([], 0)
    states = hidden[num_prompt - 1 : num_prompt - 1 + num_positions]
    ranks = [
        rank_of(drafter.lm_head(head(states)), generated[k + 1 : k + 1 + num_positions])
        for k, head in enumerate(heads)
    ]
    before_loop = loop_start(generated.tolist()) - len(heads)
    return Continuation(torch.stack(ranks, dim=1).tolist(), max(0, min(num_positions, before_loop)))


def continue_windows(
    model: PreTrainedModel, stream: torch.Tensor, drafter: Drafter, arguments: argparse.Namespace
) -> list[Continuation]:
    """Continuations of windows at random places of the held-out text."""
    generator = torch.Generator().manual_seed(arguments.seed)
    num_prompt = arguments.window_tokens
    starts = torch.randint(len(stream) - num_prompt, (arguments.windows, 1), generator=generator)
    batches = torch.split(stream[starts + torch.arange(num_prompt)], WINDOW_BATCH)
    progress = Progress(len(batches), "tokens", WINDOW_BATCH * arguments.new_tokens, every=2)
    result = []
    for done, batch in enumerate(batches, start=1):
        tokens, hidden = greedy_continue(model, batch, arguments.new_tokens)
        result += [
            continuation_of(row, states, num_prompt, drafter)
            for row, states in zip(tokens, hidden, strict=True)
        ]
        progress.update(done, "windows")
    return result


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: Drafter,
    arguments: argparse.Namespace,
) -> list[Continuation]:
    """Continuations of the demo's prompts, one by one as they differ in length."""
    require(arguments.prompts, "make_prompts.py")
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
    progress = Progress(len(lines), "tokens", arguments.new_tokens, every=16)
    result = []
    for done, line in enumerate(lines, start=1):
        prompt = torch.tensor([tokenizer(json.loads(line)["prompt"])["input_ids"]])
        tokens, hidden = greedy_continue(model, prompt, arguments.new_tokens)
        result.append(continuation_of(tokens[0], hidden[0], prompt.shape[1], drafter))
        progress.update(done, "prompts")
    return result


def positions_of(continuations: list[Continuation], with_loops: bool) -> list[Ranks]:
    """The ranks of every continuation, cut at its loop unless loops are wanted."""
    return [
        item.ranks if with_loops else item.ranks[: item.num_before_loop] for item in continuations
    ]


def best_paths(continuations: list[Ranks], num_paths: int) -> list[TreePath]:
    """The paths most often right as a whole; any prefix of the list is a tree, and the best one."""
    counts: Counter[TreePath] = Counter()
    for ranks in continuations:
        for position in ranks:
            for depth in range(1, len(position) + 1):
                if position[depth - 1] >= RANK_CAP:
                    break
                counts[tuple(position[:depth])] += 1
    # A path is never counted more often than its parent; at a tie the shallower comes first.
    ordered = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    if len(ordered) < num_paths:
        raise DemoError(f"--tree-nodes {num_paths}: only {len(ordered)} paths were ever right")
    return ordered[:num_paths]


def accepted(position: list[int], tree: frozenset[TreePath]) -> int:
    """Draft tokens accepted at a position: the longest right path that is in the tree."""
    depth = 0
    while depth < len(position) and tuple(position[: depth + 1]) in tree:
        depth += 1
    return depth


def tokens_per_step(continuations: list[Ranks], tree: frozenset[TreePath]) -> float:
    """Exact simulation: every step emits its accepted tokens and one more."""
    num_steps = num_tokens = 0
    for ranks in continuations:
        position = 0
        while position < len(ranks):
            emitted = accepted(ranks[position], tree) + 1
            position += emitted
            num_tokens += emitted
            num_steps += 1
    return num_tokens / max(1, num_steps)


def top_accuracy(continuations: list[Ranks], num_heads: int) -> dict[str, list[float]]:
    """Share of positions whose right token is among a head's first 1, 2, 5, 10 tokens."""
    positions = [position for ranks in continuations for position in ranks]
    return {
        f"top-{top}": [
            round(sum(position[k] < top for position in positions) / max(1, len(positions)), 3)
            for k in range(num_heads)
        ]
        for top in (1, 2, 5, 10)
    }


def measure(continuations: list[Ranks], paths: list[TreePath], num_heads: int) -> dict[str, Any]:
    """Accuracy of the heads and tokens per step of the chain and of the best trees."""
    chain = frozenset((0,) * depth for depth in range(1, num_heads + 1))
    steps = {f"chain of {num_heads}": round(tokens_per_step(continuations, chain), 3)}
    for size in TREE_SIZES:
        if size <= len(paths):
            tree = frozenset(paths[:size])
            steps[f"tree of {size}"] = round(tokens_per_step(continuations, tree), 3)
    return {
        "positions": sum(map(len, continuations)),
        "accuracy": top_accuracy(continuations, num_heads),
        "tokens_per_step": steps,
    }


def print_tables(results: dict[str, dict[str, Any]]) -> None:
    """Print the results as Markdown tables, one column a result."""
    for row in ("accuracy", "tokens_per_step"):
        first = next(iter(results.values()))[row]
        print(f"\n| {row} | " + " | ".join(results) + " |\n|---" + "|---" * len(results) + "|")
        for name in first:
            cells = [result[row][name] for result in results.values()]
            shown = ["/".join(map(str, cell)) if isinstance(cell, list) else cell for cell in cells]
            print(f"| {name} | " + " | ".join(map(str, shown)) + " |")


def run(arguments: argparse.Namespace) -> None:
    """Generate, build the trees, measure, write."""
    model = load_model(arguments.model)
    heads = load_heads(arguments.heads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    drafter = Drafter(heads, model.get_output_embeddings(), tokenizer.eos_token_id)
    stream = encode_stream(tokenizer, read_corpus()[1])
    windows = continue_windows(model, stream, drafter, arguments)
    prompts = continue_prompts(model, tokenizer, drafter, arguments)
    paths = best_paths(positions_of(windows, with_loops=True), arguments.tree_nodes)
    results = {
        f"{name}, {'with' if loops else 'without'} loops": measure(
            positions_of(continuations, loops), paths, len(heads)
        )
        for name, continuations in (("windows", windows), ("prompts", prompts))
        for loops in (True, False)
    }
    print_tables(results)
    if arguments.dry_run:
        return
    tree = {"format": "vllm_medusa.tree/1", "paths": [list(path) for path in paths]}
    (arguments.heads / "medusa_tree.json").write_text(json.dumps(tree) + "\n", encoding="utf-8")
    facts = provenance(seed=arguments.seed, results=results)
    write_json(arguments.heads / "measurements.json", facts)


def main() -> int:
    """Run, with errors in one line."""
    try:
        run(parse_arguments())
    except (DemoError, OSError) as error:
        print(f"measure_heads: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
