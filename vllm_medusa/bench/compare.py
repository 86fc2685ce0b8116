"""The differences of two runs, from their result files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_medusa.bench.figures import KINDS, load_name
from vllm_medusa.bench.results import read_results
from vllm_medusa.bench.spread import Spread
from vllm_medusa.errors import UserError
from vllm_medusa.reporting.tables import Table, as_text

#: Parts that must be equal for figures to be comparable.
_SETTINGS = (
    *("model", "heads", "prompts", "max_tokens", "temperature", "dtype", "ignore_eos"),
    "engine_options",
)


def compare_runs(first: Path, second: Path) -> str:
    """Describe the changes from the first run to the second.

    A change is marked if each run's median is outside the other's quartiles. Smaller changes also
    occur between two runs of the same code.

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
    kind = KINDS[before["mode"]]
    later = {_key(figure): figure for figure in after["figures"]}
    for figure in before["figures"]:
        key = _key(figure)
        for column in kind.columns if key in later else ():
            old, new = (_spread_of(found.get(column.name)) for found in (figure, later[key]))
            if old is not None and new is not None and old.median:
                table.add(
                    *key,
                    column.heading,
                    old.format(column.digits),
                    new.format(column.digits),
                    f"{new.median / old.median:.3f}",
                    "changed" if is_beyond_spread(old, new) else "",
                )
    return table


def _spread_of(values: Mapping[str, Any] | None) -> Spread | None:
    return Spread(**values) if values else None


def is_beyond_spread(old: Spread, new: Spread) -> bool:
    """Tell whether each of two spreads' medians lies outside the other's quartiles."""
    return not (old.low <= new.median <= old.high or new.low <= old.median <= new.high)


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """All other differences of the runs, as sentences."""
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
    return figure["variant"], load_name(figure.get("batch_size") or figure.get("load"))
