"""What changed between two runs, from their result files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_medusa.bench.results import read_results
from vllm_medusa.errors import UserError
from vllm_medusa.reporting.tables import Table, as_text

#: Figures that are compared, by mode: name in the file, heading, digits.
_FIGURES = {
    "offline": (
        ("tokens_per_s", "tokens/s", 1),
        ("speedup", "over baseline", 2),
        ("tokens_per_step", "tokens/step", 2),
        ("step_ms", "step ms", 2),
        ("ttft_ms", "TTFT ms", 1),
        ("tpot_ms", "TPOT ms", 2),
    ),
    "online": (
        ("tokens_per_s", "tokens/s", 1),
        ("latency_ratio", "over baseline", 2),
        ("tokens_per_step", "tokens/step", 2),
        ("ttft_ms", "TTFT ms", 1),
        ("tpot_ms", "TPOT ms", 2),
        ("e2e_ms", "latency ms", 0),
    ),
}
#: What has to be equal for figures to mean the same.
_SETTINGS = ("model", "heads", "prompts", "max_tokens", "dtype", "ignore_eos", "engine_options")


def compare_runs(first: Path, second: Path) -> str:
    """Describe what changed from the first run to the second.

    A change is marked when each run's median lies outside the other's quartiles: within them, runs
    of the same thing differ as much.

    Args:
        first: results.json of a run, or its directory.
        second: likewise.

    Raises:
        UserError: no such files, or runs of different modes.
    """
    before, after = read_results(first), read_results(second)
    if before["mode"] != after["mode"]:
        raise UserError(
            f"--compare: {first} is of mode {before['mode']!r}, {second} of {after['mode']!r}; "
            "give two runs of one mode"
        )
    table = change_table(before, after)
    lines = [as_text([table]), *_differences(before, after)]
    marked = sum(row[-1] != "" for row in table.rows)
    lines.append(f"{marked} of {len(table.rows)} figures changed by more than their spread")
    return "\n".join(lines)


def change_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table:
    """Each figure of both runs and the ratio of its medians; changes beyond the spread marked."""
    table = Table(
        "Second run against the first: median (first to third quartile)",
        ("variant", "load", "figure", "first", "second", "ratio", ""),
    )
    later = {_key(figure): figure for figure in after["figures"]}
    for figure in before["figures"]:
        key = _key(figure)
        if key not in later:
            continue
        for name, heading, digits in _FIGURES[before["mode"]]:
            old, new = figure.get(name), later[key].get(name)
            if old is None or new is None or not old["median"]:
                continue
            table.rows.append(
                (
                    *key,
                    heading,
                    _format(old, digits),
                    _format(new, digits),
                    f"{new['median'] / old['median']:.3f}",
                    "changed" if is_beyond_spread(old, new) else "",
                )
            )
    return table


def is_beyond_spread(old: Mapping[str, float], new: Mapping[str, float]) -> bool:
    """Tell whether each of two spreads' medians lies outside the other's quartiles."""
    return not (
        old["low"] <= new["median"] <= old["high"] or new["low"] <= old["median"] <= new["high"]
    )


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """What else differs between the runs, as sentences."""
    for name in _SETTINGS:
        old, new = before["settings"].get(name), after["settings"].get(name)
        if old != new:
            yield f"different setting: {name} was {old!r}, is {new!r}"
    for part in ("versions", "machine"):
        old, new = before["provenance"][part], after["provenance"][part]
        for name in old:
            if old[name] != new.get(name):
                yield f"different {part}: {name} was {old[name]!r}, is {new.get(name)!r}"
    for one, other, which in ((before, after, "first"), (after, before, "second")):
        there = {_key(figure) for figure in other["figures"]}
        for variant, load in (_key(figure) for figure in one["figures"]):
            if (variant, load) not in there:
                yield f"only in the {which} run: {variant}, {load}"
    old_same = {found["variant"]: found["num_mismatches"] for found in before.get("sameness", [])}
    for found in after.get("sameness", []):
        old = old_same.get(found["variant"])
        if old is not None and old != found["num_mismatches"]:
            yield (
                f"differing outputs: {found['variant']} had {old}, has {found['num_mismatches']} "
                f"of {found['num_compared']}"
            )


def _key(figure: Mapping[str, Any]) -> tuple[str, str]:
    load = figure["load"] if "load" in figure else f"batch {figure['batch_size']}"
    return figure["variant"], load


def _format(spread: Mapping[str, Any], digits: int) -> str:
    text = f"{spread['median']:.{digits}f}"
    if len(spread["values"]) > 1:
        text += f" ({spread['low']:.{digits}f} to {spread['high']:.{digits}f})"
    return text
