#!/usr/bin/env python3
"""Cut prompts from the corpus: the demo's, held-out ones to calibrate on, others to train on.

A prompt starts at a function or class and is cut at the end of a line, so that its continuation
starts with a line break, as in the training text. No two prompts overlap.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
from pathlib import Path

from common import DemoError, read_corpus, require, run_script
from transformers import AutoTokenizer, PreTrainedTokenizerBase

BOUNDARY = re.compile(r"^[ ]*(?:async def|def|class) ", re.MULTILINE)
MIN_TOKENS, MAX_TOKENS = 60, 200


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="for its tokenizer")
    parser.add_argument("--out", type=Path, default=Path("demo/prompts.jsonl"))
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument(
        "--calibration", type=Path, help="file for two thirds of the other held-out prompts"
    )
    parser.add_argument("--check", type=Path, help="file for the rest of them")
    parser.add_argument("--training", type=Path, help="file for prompts of the training files")
    parser.add_argument("--training-count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def cut_prompt(
    text: str, start: int, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> tuple[str, int] | None:
    """Whole lines from `start` up to a random length: (prompt, its end in the text)."""
    wanted = rng.randint(MIN_TOKENS, MAX_TOKENS)
    end = start
    for line in text[start:].splitlines(keepends=True):
        prompt = text[start : end + len(line)].rstrip()
        num_tokens = len(tokenizer(prompt)["input_ids"])
        if num_tokens > MAX_TOKENS:
            return None
        end += len(line)
        if num_tokens >= wanted:
            return prompt, end
    return None


def prompts_of(text: str, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[str]:
    """All prompts of one file that do not overlap, in random order."""
    prompts, taken_up_to = [], 0
    for match in BOUNDARY.finditer(text):
        if match.start() < taken_up_to:
            continue
        cut = cut_prompt(text, match.start(), tokenizer, rng)
        if cut is not None:
            prompt, taken_up_to = cut
            prompts.append(prompt)
    rng.shuffle(prompts)
    return prompts


def in_turn(prompts_of_files: list[list[str]]) -> list[str]:
    """One prompt of each file in turn, until there is none left."""
    columns = itertools.zip_longest(*(prompts[::-1] for prompts in prompts_of_files))
    return [prompt for column in columns for prompt in column if prompt is not None]


def category_of(prompt: str) -> str:
    """What a prompt begins with: a class, a function of a module, or one inside something else."""
    if prompt.lstrip().startswith("class "):
        return "class"
    return "inner function" if prompt.startswith(" ") else "function"


def write(path: Path, prompts: list[str], available: int) -> None:
    """Write the prompts as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"prompt": prompt, "category": category_of(prompt)} for prompt in prompts]
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{len(prompts)} prompts of {available} written to {path}")


def run(arguments: argparse.Namespace) -> None:
    """Cut, choose and write the prompts."""
    rng = random.Random(arguments.seed)
    require(arguments.model / "tokenizer.json", "train_base.py")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    training, held_out = read_corpus()
    prompts = in_turn([prompts_of(text, tokenizer, rng) for text in held_out])
    if len(prompts) < arguments.count:
        raise DemoError(f"--count {arguments.count}: the held-out files give {len(prompts)}")
    write(arguments.out, prompts[: arguments.count], len(prompts))
    # Of what is left the same share of every file to calibrate on and to check with.
    rest = prompts[arguments.count :]
    for path, chosen in (
        (arguments.calibration, [p for i, p in enumerate(rest) if i % 3]),
        (arguments.check, rest[::3]),
    ):
        if path:
            write(path, chosen, len(prompts))
    if arguments.training:
        rng.shuffle(training)
        found: list[str] = []
        for text in training:
            found += prompts_of(text, tokenizer, rng)
            if len(found) >= arguments.training_count:
                break
        write(arguments.training, found[: arguments.training_count], len(found))


if __name__ == "__main__":
    sys.exit(run_script(lambda: run(parse_arguments())))
