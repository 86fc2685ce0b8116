#!/usr/bin/env python3
"""Train several kinds of heads on the same rows, with several seeds, and compare them.

    python examples/compare_training.py --data answers --test-data greedy sampled --out out/kinds

`vllm-medusa distill` makes the rows: `--data` to learn from, `--test-data` to measure on, of other
prompts. A seed is the order of the rows. Every variant is a name and options of `vllm-medusa train`
that are added to the common ones:

    --variant "cross entropy=--loss ce" --variant "KL=--loss kl"

The heads of each run stay in `--out`. Start the same command again to go on after an interruption:
finished runs are not trained again. Written are `results.json`, `results.md` with tokens per step
(mean over the seeds, lowest and highest, and what it is more than the first variant's) and
`results.png`.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_medusa.reporting.plots import new_figure, plot_spreads, save_figure
from vllm_medusa.reporting.provenance import provenance
from vllm_medusa.reporting.tables import Table

KINDS = (
    "Medusa=",
    "root-aware=--root-aware",
    "root-aware, selector=--root-aware --selector",
    # Its one layer reads the whole path, and has more weights than three of a Medusa head.
    "Hydra=--hydra --num-layers 1",
)
#: Of the demo's heads (`make demo-model`), with fewer steps.
COMMON = "--num-layers 3 --kl-temperature 0.5 --optimizer muon --lr 6e-3 --compile"
SIZES = (4, 8, 16, 32)
BOTH = (("with looping text", "with_loops"), ("without looping text", "without_loops"))
KEPT = ("prompts", "positions", "acceptance_length", "interval")

#: Parts of reports (`report.json`) by variant, in the order of the seeds.
Reports = Mapping[str, Sequence[Mapping[str, Any]]]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo/model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--test-data", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", action="append", metavar="NAME=OPTIONS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--common", default=COMMON, help="options of all runs (%(default)s)")
    return parser.parse_args()


def train(args: argparse.Namespace, name: str, options: str, seed: int) -> dict[str, Any]:
    """Train one variant with one seed, if it is not trained yet; return its report."""
    out = args.out / re.sub(r"\W+", "-", f"{name} {seed}").lower()
    command = [sys.executable, "-m", "vllm_medusa.cli.main", "train", "--model", args.model]
    command += ["--data", args.data, "--test-data", *args.test_data, "--steps", args.steps]
    command += ["--eval-every", max(1, args.steps // 3), "--seed", seed, "--out", out]
    command += shlex.split(f"{args.common} {options}")
    print(f"{name}, seed {seed}", flush=True)
    subprocess.run(list(map(str, command)), check=True)
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    made = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    tested = []
    for test in report["tested"]:
        kept = {key: {name: test[key][name] for name in KEPT} for _, key in BOTH}
        tested.append({"data": test["data"], "temperature": test["temperature"], **kept})
    return {"seed": seed, "seconds": made["seconds"], "tested": tested}


def texts_of(reports: Reports) -> list[tuple[int, str, str, str]]:
    """Each kind of text: index of the test set, its data, what to call it, key of its figures."""
    first = next(iter(reports.values()))[0]["tested"]
    return [
        (index, test["data"], f"temperature {test['temperature']:g}, {name}", key)
        for index, test in enumerate(first)
        for name, key in BOTH
    ]


def lengths_of(reports: Reports, variant: str, test: int, key: str) -> dict[str, list[float]]:
    """Tokens per step of a variant, seed by seed, by tree."""
    all_lengths = [report["tested"][test][key]["acceptance_length"] for report in reports[variant]]
    kept = [
        tree
        for tree in all_lengths[0]
        if tree.startswith("chain") or int(tree.rpartition(" ")[2]) in SIZES
    ]
    return {tree: [lengths[tree] for lengths in all_lengths] for tree in kept}


def table_of(reports: Reports, test: int, key: str) -> str:
    """One kind of text in Markdown: a row for each variant, a column for each tree."""
    baseline = lengths_of(reports, next(iter(reports)), test, key)
    table = Table("", ["", *baseline])
    for number, variant in enumerate(reports):
        cells = []
        for tree, values in lengths_of(reports, variant, test, key).items():
            cell = f"{statistics.mean(values):.3f}"
            if len(values) > 1:
                cell += f" ({min(values):.3f} to {max(values):.3f})"
            if number:
                ratios = [a / b for a, b in zip(values, baseline[tree], strict=True)]
                cell += f", {100 * statistics.mean(ratios) - 100:+.1f} %"
            cells.append(cell)
        table.add(variant, *cells)
    return table.markdown()


def plot(reports: Reports, path: Path) -> None:
    """Draw tokens per step by the number of draft nodes, for each kind of text."""
    texts = texts_of(reports)
    labels = [("draft nodes", "tokens per step")] * len(texts)
    figure, all_axes = new_figure(*labels, size=(4 * len(texts), 4))
    for axes, (test, _, name, key) in zip(all_axes, texts, strict=True):
        for variant in reports:
            found = lengths_of(reports, variant, test, key)
            trees = {size: found[f"tree of {size}"] for size in SIZES if f"tree of {size}" in found}
            spreads = [(statistics.mean(v), min(v), max(v)) for v in trees.values()]
            plot_spreads(axes, list(trees), spreads, marker="o", label=variant)
        axes.set_title(name, fontsize=9)
    save_figure(figure, path)


def write(args: argparse.Namespace, options: Mapping[str, str], reports: Reports) -> None:
    """Write all results."""
    results = {
        **provenance(None),
        "command": shlex.join(["python", *sys.argv]),
        "common": args.common,
        "steps": args.steps,
        "variants": [
            {"name": name, "options": options[name], "runs": runs} for name, runs in reports.items()
        ],
    }
    text = json.dumps(results, indent=1) + "\n"
    (args.out / "results.json").write_text(text, encoding="utf-8")
    page = []
    for test, data, name, key in texts_of(reports):
        page += [f"{name} (`{data}`):", "", table_of(reports, test, key), ""]
    (args.out / "results.md").write_text("\n".join(page), encoding="utf-8")
    print("\n".join(page))
    plot(reports, args.out / "results.png")


def main() -> None:
    """Train and compare."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    given = (variant.partition("=") for variant in args.variant or KINDS)
    options = {name: added for name, _, added in given}
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in options}
    # Seed by seed, so that an unfinished comparison has whole seeds.
    for seed in args.seeds:
        for name, added in options.items():
            reports[name].append(train(args, name, added, seed))
    write(args, options, reports)


if __name__ == "__main__":
    main()
