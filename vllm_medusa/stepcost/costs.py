"""Step costs by batch size and draft tokens, measured on one machine.

`vllm_medusa.stepcost.measure` measures them. A cost is relative: the time of a step that verifies
drafts divided by that of a step without speculation in the same round. So a machine whose speed
changes does not distort it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from vllm_medusa.errors import UserError
from vllm_medusa.files import read_json
from vllm_medusa.tree.draft_tree import TreePath

COSTS_FORMAT = "vllm_medusa.step_costs/1"
_QUARTILES = (25, 50, 75)


@dataclass(frozen=True)
class StepCost:
    """Measured steps of one tree at one batch size.

    Attributes:
        batch_size: requests that decode.
        num_drafts: draft tokens per request; 0 is no speculation.
        num_leaves: leaf paths of the tree; 1 is a chain.
        round_ms: median time of a step in each round, in milliseconds.

    """

    batch_size: int
    num_drafts: int
    num_leaves: int
    round_ms: tuple[float, ...]

    @property
    def quartiles_ms(self) -> tuple[float, float, float]:
        """Quartiles of the rounds."""
        low, middle, high = np.percentile(self.round_ms, _QUARTILES).tolist()
        return low, middle, high


@dataclass(frozen=True)
class Relative:
    """A step's time divided by that without speculation: median and quartiles over the rounds."""

    value: float
    low: float
    high: float


class StepCosts:
    """The measured costs, interpolated between numbers of draft tokens.

    A chain is interpolated between no drafts and the measured chain, a tree between no drafts and
    the measured trees: a tree's forks have a cost that a chain does not have.

    Args:
        rows: measured rows; for every batch size one without speculation and at least one tree.
        provenance: how, where and when they were measured.

    Raises:
        UserError: if rows are missing.

    """

    def __init__(self, rows: Sequence[StepCost], provenance: Mapping[str, Any]) -> None:
        self.rows = tuple(rows)
        self.provenance = dict(provenance)
        self.batch_sizes = tuple(sorted({row.batch_size for row in rows}))
        for batch_size in self.batch_sizes:
            if self._row(batch_size, 0) is None or not self._rows(batch_size, False):
                raise UserError(
                    "the step costs lack a row without speculation, or a tree, at batch size "
                    f"{batch_size}; measure them again"
                )
        self.max_drafts = min(self._rows(size, False)[-1].num_drafts for size in self.batch_sizes)

    def baseline_ms(self, batch_size: int) -> float:
        """Return the time of a step without speculation, in milliseconds."""
        row = self._row(batch_size, 0)
        assert row is not None
        return row.quartiles_ms[1]

    def relative(self, batch_size: int, paths: Sequence[TreePath]) -> Relative:
        """Return the cost of verifying a tree, given by its paths, or nothing if it has none.

        Raises:
            UserError: if the tree is larger than all measured ones.

        """
        is_chain = bool(paths) and all(path == (0,) * len(path) for path in paths)
        base = self._row(batch_size, 0)
        assert base is not None
        points = [base, *self._rows(batch_size, is_chain)]
        if len(paths) > points[-1].num_drafts and is_chain:
            points = [base, *self._rows(batch_size, False)]
        if len(paths) > points[-1].num_drafts:
            raise UserError(
                f"the step costs go up to {points[-1].num_drafts} draft tokens, but the tree has "
                f"{len(paths)}; measure larger ones or calibrate smaller ones"
            )
        ratios = [np.divide(point.round_ms, base.round_ms) for point in points]
        sizes = [point.num_drafts for point in points]
        low, value, high = (
            float(np.interp(len(paths), sizes, [np.percentile(ratio, q) for ratio in ratios]))
            for q in _QUARTILES
        )
        return Relative(value, low, high)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; `from_dict` is the inverse."""
        rows = [{**asdict(row), "quartiles_ms": row.quartiles_ms} for row in self.rows]
        return {"format": COSTS_FORMAT, "provenance": self.provenance, "rows": rows}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepCosts:
        """Read what `to_dict` made.

        Raises:
            UserError: it does not have this form.

        """
        if values.get("format") != COSTS_FORMAT:
            raise UserError(
                f"step costs have format {values.get('format')!r}, not {COSTS_FORMAT!r}; "
                "measure them again"
            )
        try:
            rows = TypeAdapter(list[StepCost]).validate_python(values["rows"])
            provenance = dict(values["provenance"])
        except (KeyError, TypeError, ValueError):
            raise UserError("the step costs are damaged; measure them again") from None
        if len({len(row.round_ms) for row in rows}) != 1 or not rows[0].round_ms:
            raise UserError(
                "the step costs hold no measurements, or the rows have different numbers of "
                "rounds; measure them again"
            )
        return cls(rows, provenance)

    def _row(self, batch_size: int, num_drafts: int) -> StepCost | None:
        found = (r for r in self.rows if (r.batch_size, r.num_drafts) == (batch_size, num_drafts))
        return next(found, None)

    def _rows(self, batch_size: int, is_chain: bool) -> list[StepCost]:
        """Speculating rows of a batch size, the fewest drafts first."""
        rows = [
            row
            for row in self.rows
            if row.batch_size == batch_size and row.num_drafts and (row.num_leaves == 1) == is_chain
        ]
        return sorted(rows, key=lambda row: row.num_drafts)


def read_step_costs(path: Path) -> StepCosts:
    """Read a file of step costs.

    Raises:
        UserError: it cannot be read, or is not such a file.

    """
    values = read_json(path, "a file of step costs, or a calibration.json")
    # A calibration's own report holds the costs that it measured.
    return StepCosts.from_dict(values.get("step_costs") or values)
