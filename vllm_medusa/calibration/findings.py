"""All findings of a calibration, for its report and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_medusa.acceptance.intervals import Estimate
from vllm_medusa.calibration.check import Checked
from vllm_medusa.calibration.choice import Choice
from vllm_medusa.calibration.dynamic import DynamicFindings
from vllm_medusa.calibration.estimates import Curve
from vllm_medusa.calibration.settings import CalibrateSettings
from vllm_medusa.stepcost.costs import StepCosts
from vllm_medusa.tree.draft_tree import TreePath

#: Nodes of the tree that is drawn where none is chosen.
_DRAWN_SIZE = 32


@dataclass(frozen=True)
class Section:
    """The statistics of one kind of text.

    Attributes:
        name: `greedy`, `temperature T` or `all`.
        with_loops: whether looping text counts.
        curve: acceptance length.
        accuracy: of each head by top n.

    """

    name: str
    with_loops: bool
    curve: Curve
    accuracy: Mapping[int, Sequence[float]]

    @property
    def title(self) -> str:
        """Title in tables."""
        return f"{self.name}, {'with' if self.with_loops else 'without'} looping text"


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All findings of a calibration.

    Attributes:
        settings: the user's settings.
        provenance: versions, machine, command.
        num_heads: of the heads.
        num_prompts: number of prompts of the statistics.
        sections: kinds of text; trees are chosen by the first one.
        paths: each method's most probable paths.
        probabilities: share of positions at which each of the joint ones is right.
        dynamic: findings about dynamic trees.
        checked: measurements of the engine.
        costs: step costs, if they are known.
        choice: trees chosen by the costs.

    """

    settings: CalibrateSettings
    provenance: Mapping[str, Any]
    num_heads: int
    num_prompts: int
    sections: Sequence[Section]
    paths: Mapping[str, Sequence[TreePath]]
    probabilities: Mapping[TreePath, float]
    dynamic: DynamicFindings
    checked: Sequence[Checked]
    costs: StepCosts | None
    choice: Choice | None

    def predicted(self, checked: Checked, with_loops: bool) -> Estimate:
        """Return the prediction for a checked tree, on greedy text."""
        section = next(
            s for s in self.sections if s.name == "greedy" and s.with_loops == with_loops
        )
        estimates = section.curve.methods[checked.method]
        return next(e.predicted for e in estimates if e.size == checked.size)

    def drawn_tree(self) -> Sequence[TreePath]:
        """Return the tree to draw: the one of the smallest batch, if there is one."""
        if self.choice is not None:
            chosen = self.choice.candidates[self.choice.chosen[min(self.choice.chosen)]]
            if chosen.paths:
                return chosen.paths
        return self.paths["joint"][:_DRAWN_SIZE]
