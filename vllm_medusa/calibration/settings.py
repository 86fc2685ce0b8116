"""The settings of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from vllm_medusa.errors import UserError
from vllm_medusa.settings import Counts, PathText, flag_of, refuse_own_options, settings
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


def _check_size(size: int) -> int:
    if not 1 <= size <= MAX_DRAFT_TOKENS:
        raise ValueError(f"a tree has 1 to {MAX_DRAFT_TOKENS} draft nodes")
    return size


def _in_order(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(sizes)))


TreeSize = Annotated[int, AfterValidator(_check_size)]
TreeSizes = Annotated[tuple[TreeSize, ...], Field(strict=False), AfterValidator(_in_order)]


@settings
class CalibrateSettings:
    """The settings of one calibration."""

    FLAGS: ClassVar[Mapping[str, str]] = {
        "check_sizes": "--check",
        "with_step_costs": "--no-step-costs",
    }

    heads: str
    """Heads: directory, file or hub name."""
    revision: str | None = None
    """Revision of the heads, if they are a hub name."""
    model: str
    """The target model: directory or hub name."""
    model_revision: str | None = None
    """Revision of the target model, if it is a hub name."""
    prompts: PathText
    """Held-out prompts (JSONL), or a directory of rows that vllm-medusa distill wrote."""
    max_prompts: PositiveInt | None = None
    """Use only the first N prompts (all)."""
    out: PathText | None = None
    """Directory to write to (the heads' own directory)."""
    max_tokens: Annotated[int, Field(ge=2)] = 128
    """Number of tokens of each continuation."""
    temperature: Annotated[PositiveFloat, Field(allow_inf_nan=False)] | None = None
    """Also continue by sampling at this temperature; greedy continuations are always used."""
    sizes: Annotated[TreeSizes, Field(min_length=1)] = SIZES
    """Numbers of draft nodes to make trees of."""
    batch_sizes: Counts | None = None
    """Batch sizes to choose trees for (1,2,4,8,16,32, or those of --step-costs)."""
    cost_sizes: TreeSizes | None = None
    """Numbers of draft nodes to measure step costs of (four of --sizes)."""
    step_costs: PathText | None = None
    """Use the step costs of this file; measure none."""
    with_step_costs: bool = True
    """Use no step costs: write the best trees, but no tree schedule."""
    rounds: PositiveInt = 5
    """Number of measured rounds."""
    engines_at_once: PositiveInt | None = None
    """Engines in memory at the same time (on a CPU all, on an accelerator 1)."""
    check_sizes: TreeSizes = ()
    """Measure trees of these sizes in the engine."""
    check_prompts: PathText | None = None
    """Other held-out prompts, for --check."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type to compute in; auto: that of the target's config.json."""
    llm_options: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of vllm.LLM: those that you serve with."""
    seed: int = 0
    """Seed of the folds and the intervals."""

    def __post_init__(self) -> None:
        refuse_own_options(self.llm_options, _OWN_OPTIONS)
        largest = max(self.sizes)
        measures = self.with_step_costs and self.step_costs is None
        for name in ("batch_sizes", "cost_sizes"):
            if getattr(self, name) is not None and not measures:
                raise UserError(
                    f"{flag_of(type(self), name)}: says what to measure, but no step costs are to "
                    "be measured; leave it out"
                )
        for name in ("cost_sizes", "check_sizes"):
            if max(getattr(self, name) or (1,)) > largest:
                raise UserError(
                    f"{flag_of(type(self), name)} {getattr(self, name)}: no tree is larger than "
                    f"the largest of --sizes, {largest}"
                )
        if self.cost_sizes is not None and largest not in self.cost_sizes:
            raise UserError(
                f"--cost-sizes {self.cost_sizes}: must hold {largest}, the largest of --sizes"
            )
        if bool(self.check_sizes) != (self.check_prompts is not None):
            raise UserError(
                "--check and --check-prompts: give both or none; the check needs prompts of its own"
            )
        if not self.with_step_costs and self.step_costs is not None:
            raise UserError("--no-step-costs and --step-costs: give one of them")

    def timed_sizes(self) -> tuple[int, ...]:
        """Return the sizes whose steps are timed: the smallest, the largest, two between."""
        if self.cost_sizes is not None:
            return self.cost_sizes
        last = len(self.sizes) - 1
        return tuple(sorted({self.sizes[round(last * part / 3)] for part in range(4)}))
