"""The report of a training as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_medusa.acceptance.texts import LOOP_TOKENS

#: Name and key of both kinds of figures.
_BOTH = (("with looping text", "with_loops"), ("without", "without_loops"))
#: Trees in the tables by category, if the report has them.
_BY_CATEGORY = ("tree of 4", "tree of 16")


def markdown(model: str, report: Mapping[str, Any]) -> str:
    """Return the report as a page of Markdown.

    Args:
        model: the target.
        report: as `report.json` has it.
    """
    lines = [
        "# Training report",
        "",
        f"Medusa heads for `{model}`, the best of {len(report['evaluations'])} measurements (after "
        f"step {report['best_step']}), on held-out answers that they did not learn from. An answer "
        f"loops from its first {LOOP_TOKENS} tokens in a row that it had written before.",
        "",
        *_table(f"held out, {_sampling(report['held_out_temperature'])}", report["held_out"]),
        *_categories(report["held_out"]),
        *_joint_lines(report.get("joint")),
        "Tokens per step, with the 95 % interval of a bootstrap over the prompts, are simulated "
        "exactly along the answers, with the trees of `medusa_tree.json`. These come from the "
        "held-out answers, and the best heads were chosen by them too: `--test-data` and "
        "`vllm-medusa calibrate` measure on others.",
        "",
    ]
    for test in report["tested"]:
        left_out = ""
        if test["rows_left_out"]:
            left_out = f" ({test['rows_left_out']} rows with prompts of the training left out)"
        lines += [
            f"## `{test['data']}`",
            "",
            f"Answers to other prompts{left_out}: neither learnt from, nor used to choose heads or "
            "trees.",
            "",
            *_table(_sampling(test["temperature"]), test),
            *_categories(test),
        ]
    lines.append("![loss and acceptance length](report.png)")
    return "\n".join(lines) + "\n"


def _sampling(temperature: float) -> str:
    return f"temperature {temperature:g}" if temperature else "greedy"


def _table(title: str, figures: Mapping[str, Any]) -> list[str]:
    """All figures of one set of answers, with loops and without."""
    columns = [figures[key] for _, key in _BOTH]
    lines = [
        f"| {title} | " + " | ".join(name for name, _ in _BOTH) + " |",
        "|---|" + "---:|" * len(_BOTH),
        "| positions | " + " | ".join(str(column["positions"]) for column in columns) + " |",
    ]
    for name in columns[0]["accuracy"]:
        cells = [" / ".join(f"{x:.3f}" for x in column["accuracy"][name]) for column in columns]
        lines.append(f"| {name} accuracy, head by head | " + " | ".join(cells) + " |")
    for name in columns[0]["acceptance_length"]:
        cells = [_length(column, name, 3) for column in columns]
        lines.append(f"| tokens per step, {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _categories(figures: Mapping[str, Any]) -> list[str]:
    """Tokens per step by the category of the prompt; nothing if prompts have none."""
    if "categories" not in figures:
        return []
    known = figures["with_loops"]["acceptance_length"]
    trees = [name for name in known if name.startswith("chain") or name in _BY_CATEGORY]
    columns = [(f"{tree}, {name}", tree, key) for tree in trees for name, key in _BOTH]
    lines = [
        "| category | prompts | " + " | ".join(column for column, _, _ in columns) + " |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for category, found in figures["categories"].items():
        cells = [_length(found[key], tree, 2) for _, tree, key in columns]
        prompts = found["with_loops"]["prompts"]
        lines.append(f"| {category} | {prompts} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _length(figures: Mapping[str, Any], tree: str, digits: int) -> str:
    """Tokens per step with its interval; nothing without a position."""
    if not figures["positions"]:
        return ""
    low, high = figures["interval"][tree]
    return f"{figures['acceptance_length'][tree]:.{digits}f} ({low:.2f} to {high:.2f})"


def _joint_lines(joint: Mapping[str, Any] | None) -> Sequence[str]:
    """The part of the page that says what training the target too has changed."""
    if joint is None:
        return []
    before, after = joint["before"], joint["after"]
    rows = [
        ("perplexity of the held-out answers", "perplexity", ".4f"),
        ("share of their tokens that it finds likeliest", "top_1", ".4f"),
    ]
    lines = [
        "The target was trained too. *Before* is what the steps that trained it began with. The "
        "answers are those of the target before: it would give others now, on which `vllm-medusa "
        "calibrate` measures.",
        "",
        "| the target, and tokens per step with looping text | before | after |",
        "|---|---:|---:|",
    ]
    for label, key, form in rows:
        cells = [format(part["target"][key], form) for part in (before, after)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lengths = [part["held_out"]["with_loops"]["acceptance_length"] for part in (before, after)]
    for name in lengths[1]:
        cells = [f"{part[name]:.3f}" if name in part else "" for part in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]
