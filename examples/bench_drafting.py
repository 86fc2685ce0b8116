"""What building the trees of a step costs on the host: time by batch size, and what it goes to.

    python examples/bench_drafting.py [--batch-sizes 1,8,32] [--nodes 16] [--out results.json]

Texts are random, but repeat themselves as real ones do; the heads guess with random probabilities.
It computes on one thread (set ``OMP_NUM_THREADS=1``) and needs no model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from vllm_medusa.draft.costs import CostCurve
from vllm_medusa.draft.drafter import Drafter, DraftSettings, compile_ahead
from vllm_medusa.draft.order import depth_first
from vllm_medusa.draft.probability import Probabilities
from vllm_medusa.draft.types import Request
from vllm_medusa.reporting.provenance import cpu_name

NUM_HEADS, NUM_GUESSES, VOCAB_SIZE = 4, 10, 32_000
NUM_STEPS, NUM_WARM_STEPS = 300, 50
GOALS_MS = {1: 0.3, 32: 2.0}
TIMES = ("median_ms", "p10_ms", "mean_ms", "p99_ms", "first_step_ms")


class Texts:
    """B texts that grow, of which a part repeats what they have already."""

    def __init__(self, batch_size: int, prompt_length: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.texts = np.zeros((batch_size, prompt_length + 20 * NUM_STEPS), dtype=np.int64)
        self.lengths = np.zeros(batch_size, dtype=np.int64)
        self.num_prompt_tokens = prompt_length
        for row in range(batch_size):
            while self.lengths[row] < prompt_length:
                self.grow(row, int(self.random.integers(1, 20)))

    def grow(self, row: int, count: int) -> None:
        """Add tokens: half of the time a copy of earlier ones, else frequent words or rare ones."""
        length = int(self.lengths[row])
        if length > count and self.random.random() < 0.5:
            start = int(self.random.integers(0, length - count))
            new = self.texts[row, start : start + count]
        else:
            new = self.random.zipf(1.3, count) % VOCAB_SIZE
        self.texts[row, length : length + count] = new
        self.lengths[row] += count

    def requests(self) -> list[Request]:
        """Return the texts as they are."""
        return [
            Request(str(row), self.texts[row, :length], self.num_prompt_tokens)
            for row, length in enumerate(self.lengths.tolist())
        ]

    def guesses(self) -> tuple[np.ndarray, np.ndarray]:
        """Return random guesses with falling probabilities."""
        shape = (len(self.texts), NUM_HEADS, NUM_GUESSES)
        tokens = self.random.integers(0, VOCAB_SIZE - NUM_GUESSES, (*shape[:2], 1))
        probability = -np.sort(-self.random.dirichlet(np.full(NUM_GUESSES, 0.3), shape[:2]))
        return tokens + np.arange(NUM_GUESSES), probability * 0.9


def measure(batch_size: int, num_nodes: int, prompt_length: int) -> dict[str, float]:
    """Time steps of one batch size; milliseconds."""
    texts = Texts(batch_size, prompt_length, seed=batch_size)
    points = [(tokens, 10 + 0.2 * tokens) for tokens in range(1, 1024)]
    drafter = Drafter(
        DraftSettings(max_nodes=num_nodes),
        Probabilities.default(NUM_HEADS, NUM_GUESSES),
        CostCurve({batch_size: points}, fork_ms=0.02),
    )
    times, nodes = [], []
    compile_ahead()
    started = time.thread_time()
    depth_first(drafter.propose(texts.requests(), texts.guesses()))
    first = time.thread_time() - started
    for _ in range(NUM_WARM_STEPS + NUM_STEPS):
        for row in range(batch_size):
            texts.grow(row, int(texts.random.integers(1, 6)))
        requests, guesses = texts.requests(), texts.guesses()
        started = time.thread_time()
        drafter.levels(batch_size)
        drafts = depth_first(drafter.propose(requests, guesses))
        times.append(time.thread_time() - started)
        nodes.append(len(drafts.tokens))
    ms = 1000 * np.array(times[NUM_WARM_STEPS:])
    return {
        "batch_size": batch_size,
        "median_ms": float(np.median(ms)),
        "p10_ms": float(np.percentile(ms, 10)),
        "mean_ms": float(ms.mean()),
        "p99_ms": float(np.percentile(ms, 99)),
        "first_step_ms": 1000 * first,
        "nodes_per_request": float(np.mean(nodes)) / batch_size,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--prompt-length", type=int, default=512)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    names = "  ".join(f"{key.removesuffix('_ms'):>9}" for key in TIMES)
    print(f"batch  {names}  nodes/request  goal")
    for batch_size in map(int, arguments.batch_sizes.split(",")):
        row = measure(batch_size, arguments.nodes, arguments.prompt_length)
        rows.append(row)
        times = "  ".join(f"{row[key]:9.3f}" for key in TIMES)
        goal = GOALS_MS.get(batch_size, "")
        print(f"{batch_size:5}  {times}  {row['nodes_per_request']:13.1f}  {goal}")
    if arguments.out:
        given = {key: str(value) for key, value in vars(arguments).items() if key != "out"}
        result = {"cpu": cpu_name(), "numpy": np.__version__, "settings": given, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
