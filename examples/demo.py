"""What a draft tree is for: the same text, in fewer steps, in less time.

Run it with `make demo`. The demo model is inflated first (`inflate.py`), so that its weights cost
something, as those of a real model do. Then two engines, each on one thread, write a text side by
side: one without speculation, one with draft trees from the demo's Medusa heads and the text so
far. Last they take turns at some prompts, one prompt at a time, and the medians are printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from inflate import inflate
from rich import box
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from vllm_medusa.bench.sameness import TIE_LOGPROB, first_difference
from vllm_medusa.engines.engine import EngineProcess, Run, thread_environment
from vllm_medusa.reporting.tree_pictures import VerifiedTree, draw_trees
from vllm_medusa.target.precision import fast_dtype

EXAMPLES = Path(__file__).resolve().parent
DEMO = EXAMPLES.parent / "demo"
DTYPE = fast_dtype()
#: An engine that got less than this share of a core was disturbed by other programs.
QUIET_SHARE = 0.9
#: So was a measurement whose best round's ratio is more than this times its worst.
STEADY_RATIO = 1.5


def main() -> None:
    """Inflate the model, start both engines, run them side by side and in turns, print."""
    args = arguments()
    console = Console()
    logging.disable_progress_bar()
    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[: args.prompts]]
    by_size = args.tree.isdigit()
    tree = {"num_speculative_tokens": int(args.tree)} if by_size else {"tree": args.tree}
    medusa = {"method": "medusa", "model": str(DEMO / "heads"), **tree}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = Path(folder) / "model"
        console.print("Inflating the demo model ...")
        num_parameters = write_inflated(model, 1e6 * args.megabytes)
        console.print(
            f"Starting two engines of {num_parameters / 1e6:.0f} M parameters, {DTYPE} ..."
        )
        name = f"with a tree of {args.tree} nodes" if by_size else f"with {args.tree} trees"
        sides = [
            Side.start("without speculation", model, {}),
            Side.start(name, model, {"speculative_config": medusa}),
        ]
        for side in sides:
            stack.enter_context(side.engine)
        for side in sides:
            side.engine.wait()
            side.engine.run(prompts[:1], 8)
        show_side_by_side(console, sides, prompts[0], args.max_tokens)
        draw_best_step(console, sides[1], args.picture)
        rounds = [
            [measure(side, prompts, args.max_tokens) for side in sides] for _ in range(args.rounds)
        ]
        same = report_sameness(console, sides[0].engine, prompts, rounds[0])
    report_speed(console, sides, rounds)
    if not same:
        raise SystemExit(1)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200, help="size of the weights (200)")
    parser.add_argument(
        "--tree",
        default="dynamic",
        help="any tree of the README; a number: the heads' best tree of so many nodes (dynamic)",
    )
    parser.add_argument("--prompts", type=int, default=3, help="how many prompts (3)")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens of each text (48)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (3)")
    parser.add_argument(
        "--picture", type=Path, default=Path("out/demo-tree.png"), help="where the tree is drawn"
    )
    return parser.parse_args()


def write_inflated(out: Path, size: float) -> int:
    """Write the demo model, inflated to so many bytes; return how many parameters it has."""
    dtype: torch.dtype = getattr(torch, DTYPE)
    small = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    large = inflate(small, size / dtype.itemsize)
    large.to(dtype).save_pretrained(out)
    AutoTokenizer.from_pretrained(DEMO / "model").save_pretrained(out)
    return int(large.num_parameters())


@dataclass
class Side:
    """One of the two engines, and what it wrote down of its steps (`engines.watching`).

    Attributes:
        name: as shown.
        engine: its process.
        log: the file of its steps.

    """

    name: str
    engine: EngineProcess
    log: Path

    @classmethod
    def start(cls, name: str, model: Path, options: dict[str, Any]) -> Side:
        """Start an engine on one thread; its log lies beside the model."""
        log = model.parent / f"{name}.jsonl"
        log.touch()
        engine = EngineProcess(
            {
                "model": str(model),
                "dtype": DTYPE,
                "max_model_len": 512,
                "max_num_batched_tokens": 512,
                "max_num_seqs": 4,
                "block_size": 32,
                "kv_cache_memory_bytes": 2**27,
                "enforce_eager": True,
                # Off, so that every round runs the prompts anew.
                "enable_prefix_caching": False,
                **options,
            },
            thread_environment(1),
            watch=log,
        )
        return cls(name, engine, log)

    def events(self, start: int = 0) -> list[dict[str, Any]]:
        """What the log holds from a byte on; the last line may not be whole yet."""
        with self.log.open("rb") as log:
            log.seek(start)
            return [json.loads(line) for line in log if line.endswith(b"\n")]


def show_side_by_side(
    console: Console, sides: list[Side], prompt: str, max_tokens: int
) -> list[Run]:
    """Run both engines at the same time and show their texts as they grow."""
    starts = [side.log.stat().st_size for side in sides]
    console.print("\nThe prompt ends in", Text(prompt[-200:], style="dim"), sep="\n")
    with ThreadPoolExecutor(len(sides)) as pool, Live(console=console, auto_refresh=False) as live:
        runs = [pool.submit(side.engine.run, [prompt], max_tokens) for side in sides]
        finished = False
        while not finished:
            finished = all(run.done() for run in runs)
            grid = Table.grid(expand=True)
            for _ in sides:
                grid.add_column(ratio=1)
            grid.add_row(
                *(
                    panel(side, start, run.result().seconds if run.done() else None)
                    for side, start, run in zip(sides, starts, runs, strict=True)
                )
            )
            live.update(grid, refresh=True)
            time.sleep(0.05)
    console.print()
    return [run.result() for run in runs]


def panel(side: Side, start: int, seconds: float | None) -> Panel:
    """One engine's text so far."""
    events = [event for event in side.events(start) if "text" in event]
    tokens = sum(event["num_tokens"] for event in events)
    time_taken = "" if seconds is None else f" in {seconds:.1f} s"
    return Panel(
        Text("".join(event["text"] for event in events)),
        title=side.name,
        subtitle=f"{tokens} tokens, {len(events)} steps{time_taken}",
        box=box.ASCII,
    )


def draw_best_step(console: Console, side: Side, picture: Path) -> None:
    """Draw the tree of the step that accepted most."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    trees = VerifiedTree.of_events(side.events())
    if not trees:
        console.print("No step verified a tree, so there is none to draw.")
        return
    best = max(trees, key=lambda tree: len(tree.accepted))
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_trees([best], tokenizer.decode, picture)
    console.print(
        f"One step's tree, of which {len(best.accepted)} of {len(best.tokens)} draft tokens "
        f"were accepted: {picture}"
    )


@dataclass(frozen=True)
class Measured:
    """One engine's runs of all prompts, one after the other, in one round.

    Attributes:
        runs: what each prompt gave.
        core_share: processor time of the engine over the time that passed.

    """

    runs: list[Run]
    core_share: float

    @property
    def tokens_per_second(self) -> float:
        """Over all prompts, their own steps included."""
        return sum(run.num_tokens for run in self.runs) / sum(run.seconds for run in self.runs)

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a decode step, over all prompts."""
        steps = sum(len(run.step_ms) - 1 for run in self.runs)
        return sum(run.num_tokens - 1 for run in self.runs) / max(steps, 1)


def measure(side: Side, prompts: list[str], max_tokens: int) -> Measured:
    """Run the prompts one at a time."""
    process = psutil.Process(side.engine.pid)
    cpu, start = processor_time(process), time.perf_counter()
    runs = [side.engine.run([prompt], max_tokens) for prompt in prompts]
    share = (processor_time(process) - cpu) / (time.perf_counter() - start)
    return Measured(runs, share)


def processor_time(process: psutil.Process) -> float:
    """Seconds on a core so far, all threads."""
    times = process.cpu_times()
    return times.user + times.system


def report_sameness(
    console: Console, plain: EngineProcess, prompts: list[str], measured: list[Measured]
) -> bool:
    """Print whether the texts are the same; return False for a difference that is a fault."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    same, fault = 0, False
    for prompt, without, with_tree in zip(prompts, *(m.runs for m in measured), strict=True):
        tokens = without.token_ids[0]
        difference = first_difference(tokens, with_tree.token_ids[0])
        if difference is None:
            same += 1
            continue
        position, *pair = difference
        before = [*tokenizer(prompt)["input_ids"], *tokens[:position]]
        ours, theirs = plain.score([[*before, token] for token in pair])
        gap = abs(ours - theirs)
        fault |= gap > TIE_LOGPROB[DTYPE]
        console.print(
            f"One text parts at token {position}, where two tokens' log-probabilities differ by "
            f"{gap:.3f}: " + ("a fault." if gap > TIE_LOGPROB[DTYPE] else "rounding decides.")
        )
    console.print(f"{same} of {len(prompts)} texts are identical, token for token.\n")
    return not fault


def report_speed(console: Console, sides: list[Side], rounds: list[list[Measured]]) -> None:
    """Print the medians, their ratio, and whether they mean anything."""
    table = Table("", "tokens per step", "tokens per second", box=box.ASCII2)
    for side, measured in zip(sides, zip(*rounds, strict=True), strict=True):
        per_step = statistics.median(m.tokens_per_step for m in measured)
        per_second = statistics.median(m.tokens_per_second for m in measured)
        table.add_row(side.name, f"{per_step:.2f}", f"{per_second:.1f}")
    console.print(table)
    ratios = [tree.tokens_per_second / plain.tokens_per_second for plain, tree in rounds]
    console.print(
        f"Tokens per second with trees over those without: {statistics.median(ratios):.2f} "
        f"(median of {len(ratios)} rounds in turns, {min(ratios):.2f} to {max(ratios):.2f})"
    )
    share = min(measured.core_share for pair in rounds for measured in pair)
    if share < QUIET_SHARE or max(ratios) > STEADY_RATIO * min(ratios):
        console.print(
            f"The machine is too busy to tell: an engine had its core for {share:.0%} of the time "
            "in the worst round. Run it again when nothing else runs."
        )


if __name__ == "__main__":
    main()
