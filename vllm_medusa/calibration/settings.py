"""What a calibration is asked to do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_medusa.errors import UserError
from vllm_medusa.tree.draft_tree import MAX_DRAFT_TOKENS

SIZES = (4, 8, 12, 16, 24, 32, 48, 64)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
#: Arguments of ``vllm.LLM`` that the caller may not set, and what sets them.
_OWN_OPTIONS = {
    "model": "--model",
    "revision": "--model-revision",
    "dtype": "--dtype",
    "speculative_config": "this command, which tries several",
}


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings:
    """The settings of one calibration.

    Attributes:
        heads, revision: the heads, and the revision of a hub name.
        model, model_revision: the target, and the revision of a hub name.
        prompts: file of prompts, or directory of rows that `vllm-medusa distill` wrote.
        max_prompts: use the first so many prompts or rows; None is all.
        out: directory to write to; None is that of the heads.
        max_tokens: of a continuation.
        temperature: also sample continuations at it; None is greedy ones only.
        sizes: draft nodes of the trees.
        batch_sizes: to measure step costs at and to choose trees for; None is `BATCH_SIZES`, or
            those of the file of step costs.
        cost_sizes: draft nodes of the trees whose steps are timed; None is four of `sizes`.
        step_costs: file of step costs measured before; None is to measure them.
        with_step_costs: whether to choose trees by step costs at all.
        rounds: timed ones.
        engines_at_once: engines in memory at a time while steps are timed; None is all of them on
            a CPU and one on an accelerator, whose memory one engine fills.
        check_sizes: draft nodes of the trees that the engine itself is measured with.
        check_prompts: file of other prompts, for that.
        dtype: to compute in; ``auto`` is what the target's config.json names.
        llm_options: further arguments of ``vllm.LLM``.
        seed: of folds and intervals.

    """

    heads: str
    revision: str | None = None
    model: str
    model_revision: str | None = None
    prompts: Path
    max_prompts: int | None = None
    out: Path | None = None
    max_tokens: int = 128
    temperature: float | None = None
    sizes: tuple[int, ...] = SIZES
    batch_sizes: tuple[int, ...] | None = None
    cost_sizes: tuple[int, ...] | None = None
    step_costs: Path | None = None
    with_step_costs: bool = True
    rounds: int = 5
    engines_at_once: int | None = None
    check_sizes: tuple[int, ...] = ()
    check_prompts: Path | None = None
    dtype: str = "auto"
    llm_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_prompts", "rounds", "engines_at_once"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{_option(name)} {value}: give 1 or more")
        _require(self.max_tokens >= 2, f"--max-tokens {self.max_tokens}: give 2 or more")
        temperature = self.temperature
        _require(
            temperature is None or (math.isfinite(temperature) and temperature > 0),
            f"--temperature {temperature}: give a positive number; greedy text is always used",
        )
        for name in ("sizes", "cost_sizes", "check_sizes"):
            for size in getattr(self, name) or ():
                _require(
                    1 <= size <= MAX_DRAFT_TOKENS,
                    f"{_option(name)} {size}: a tree has 1 to {MAX_DRAFT_TOKENS} draft nodes",
                )
        _require(bool(self.sizes), "--sizes: give at least one")
        for size in self.batch_sizes or ():
            _require(size >= 1, f"--batch-sizes {size}: give 1 or more")
        for name in ("batch_sizes", "cost_sizes"):
            _require(
                getattr(self, name) is None or (self.with_step_costs and self.step_costs is None),
                f"{_option(name)}: says what to measure, but no step costs are to be measured; "
                "leave it out",
            )
        largest = max(self.sizes)
        for name in ("cost_sizes", "check_sizes"):
            _require(
                max(getattr(self, name) or (1,)) <= largest,
                f"{_option(name)} {getattr(self, name)}: no tree is larger than the largest of "
                f"--sizes, {largest}",
            )
        _require(
            self.cost_sizes is None or largest in self.cost_sizes,
            f"--cost-sizes {self.cost_sizes}: must hold {largest}, the largest of --sizes",
        )
        _require(
            bool(self.check_sizes) == (self.check_prompts is not None),
            "--check and --check-prompts: give both or none; the check needs prompts of its own",
        )
        _require(
            self.with_step_costs or self.step_costs is None,
            "--no-step-costs and --step-costs: give one of them",
        )
        for name, option in _OWN_OPTIONS.items():
            _require(name not in self.llm_options, f"--llm-options: {name!r} is set by {option}")

    def timed_sizes(self) -> tuple[int, ...]:
        """Return the sizes whose steps are timed: the smallest, the largest, two between."""
        if self.cost_sizes is not None:
            return self.cost_sizes
        last = len(self.sizes) - 1
        return tuple(sorted({self.sizes[round(last * part / 3)] for part in range(4)}))

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values."""
        values = dataclasses.asdict(self) | {"llm_options": dict(self.llm_options)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def _option(name: str) -> str:
    return {"check_sizes": "--check"}.get(name, f"--{name.replace('_', '-')}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)
