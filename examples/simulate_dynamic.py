"""What dynamic trees would bring on a machine with given step costs, without that machine.

    python examples/simulate_dynamic.py PROMPTS.jsonl [--costs 1:40,6:37,12:48,65:152] [--json FILE]

The model continues the prompts greedily, without speculation. Then drafting along the first half of
the answers fits the curves, and drafting along the other half is simulated with the budget, which
reads the costs: milliseconds of a step by its tokens, in between interpolated. One line for each
batch size: tokens per second over no speculation, tokens and nodes per step, and the share of steps
in which the heads ran.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import torch

from vllm_medusa.calibration import dynamic
from vllm_medusa.calibration.inputs import read_inputs
from vllm_medusa.calibration.run import measure_ranks
from vllm_medusa.calibration.settings import CalibrateSettings
from vllm_medusa.draft.costs import CostCurve
from vllm_medusa.draft.drafter import Drafter, DraftSettings
from vllm_medusa.draft.probability import Probabilities
from vllm_medusa.draft.replay import GuessedText, Tables, replay
from vllm_medusa.heads.selector import Selector
from vllm_medusa.tree.draft_tree import DraftTree, read_tree_file
from vllm_medusa.tree.limits import DynamicTrees

ROOT = Path(__file__).resolve().parent.parent
#: Of the demo model inflated to 400 M, bfloat16, on two cores of an AMD EPYC with AVX-512.
COSTS = "1:40.5,3:37,6:37,7:40.5,9:43.5,12:48.5,16:54.5,33:89.5,65:152.5,129:274.5"
#: What drafting nothing saves of a step, and what the heads and a fork cost, on that machine.
IDLE_MS, HEADS_MS, FORK_MS = 2.5, ((1, 2.35), (32, 4.0)), 0.1


def main() -> None:
    """Simulate and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--heads", default=str(ROOT / "demo" / "heads"))
    parser.add_argument("--costs", default=COSTS, help=f"TOKENS:MS,... (default: {COSTS})")
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    points = [pair.split(":") for pair in args.costs.split(",")]
    costs = CostCurve(
        {1: [(int(tokens), float(ms)) for tokens, ms in points]}, heads=HEADS_MS, fork_ms=FORK_MS
    )
    probabilities, texts, tables = learn(args)
    rows = []
    print("batch  speed-up  tokens/step  nodes/step  heads ran")
    for size in map(int, args.batch_sizes.split(",")):
        row = simulate(copy.deepcopy(probabilities), texts, tables, costs, size)
        rows.append({"batch_size": size, **row})
        print(
            f"{size:>5}  {row['speed_up']:>8.3f}  {row['tokens_per_step']:>11.2f}  "
            f"{row['nodes_per_step']:>10.1f}  {row['heads_ran']:>9.2f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def learn(args: argparse.Namespace) -> tuple[Probabilities, list[GuessedText], Tables | None]:
    """Return the curves of the first half of the prompts, and the second half's answers."""
    settings = CalibrateSettings(
        model=args.model,
        heads=args.heads,
        prompts=args.prompts,
        # A step near the end of an answer does not count, for it may be cut.
        max_tokens=args.max_tokens + DynamicTrees().max_depth,
        dtype="float32",
        llm_options={"enforce_eager": True},
    )
    inputs = read_inputs(settings)
    found = measure_ranks(settings, inputs)
    selector = None
    if inputs.checkpoint.spec.selector_rank is not None:
        selector = Selector.from_tensors(inputs.checkpoint.tensors, torch.float32)
    tree = DraftTree.from_paths(read_tree_file(Path(args.heads) / "medusa_tree.json"))
    probabilities = dynamic.fit_probabilities(found[::2], tree, selector)
    texts = [
        dynamic.guessed_text(item, tree, with_loops=True, all_guesses=selector is not None)
        for item in found[1::2]
    ]
    texts = [
        replace(text, num_positions=min(text.num_positions, args.max_tokens)) for text in texts
    ]
    if selector is None:
        return probabilities, texts, None
    superset = probabilities.superset.cut_to_depth(DynamicTrees().max_depth)
    return probabilities, texts, dynamic.tables_of(selector, superset)


def simulate(
    probabilities: Probabilities,
    texts: list[GuessedText],
    tables: Tables | None,
    costs: CostCurve,
    batch_size: int,
) -> dict[str, float]:
    """Return the figures of one batch size."""
    bounds = DynamicTrees()
    settings = DraftSettings(max_leaves=bounds.max_paths, max_depth=bounds.max_depth)
    drafter = Drafter(settings, probabilities, costs, by_parent=tables is not None)
    replayed = replay(texts, drafter, batch_size, tables)
    total_ms = plain_ms = 0.0
    for requests, nodes, forks, ran_heads in replayed.steps:
        by_drafts = costs.by_drafts(requests, nodes)
        total_ms += float(by_drafts[nodes]) + FORK_MS * forks
        total_ms += costs.heads_ms(requests) if ran_heads else 0.0
        # The plugin's own work in a step is left out where there is no plugin.
        plain_ms += replayed.num_tokens / replayed.num_requests * (float(by_drafts[0]) - IDLE_MS)
    steps = len(replayed.steps)
    return {
        "speed_up": plain_ms / total_ms,
        "tokens_per_step": replayed.tokens_per_step,
        "nodes_per_step": sum(nodes for _, nodes, _, _ in replayed.steps) / steps,
        "heads_ran": sum(ran for *_, ran in replayed.steps) / steps,
    }


if __name__ == "__main__":
    main()
