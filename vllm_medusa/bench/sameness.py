"""Compares the outputs of a lossless variant with the baseline's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: Two tokens whose log-probabilities differ by no more are a near-tie, which rounding decides.
#: A bfloat16 logit of magnitude 16 to 32 has steps of 1/8, a float16 one of 1/64, and summing in
#: another order moves each of the two by a step or so.
TIE_LOGPROB = {"bfloat16": 0.25, "float16": 0.0625, "float32": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """The first difference between a variant's output and the baseline's.

    Attributes:
        variant: its name.
        batch_size: requests at once.
        round: number of the round, from 1.
        prompt_id: of the prompt.
        position: index of the first token that differs, counted from the prompt's end.
        baseline_token: the baseline's token there; None if its output has ended.
        variant_token: the variant's.
        baseline_logprob: the baseline's log-probability of its own token, from a second pass; None
            if there was none.
        variant_logprob: its log-probability of the variant's token.
    """

    variant: str
    batch_size: int
    round: int
    prompt_id: str
    position: int
    baseline_token: int | None
    variant_token: int | None
    baseline_logprob: float | None = None
    variant_logprob: float | None = None

    @property
    def gap(self) -> float | None:
        """Difference of the two log-probabilities."""
        if self.baseline_logprob is None or self.variant_logprob is None:
            return None
        return abs(self.baseline_logprob - self.variant_logprob)

    def is_near_tie(self, dtype: str) -> bool:
        """Whether rounding in this dtype can have decided."""
        return self.gap is not None and self.gap <= TIE_LOGPROB.get(dtype, TIE_LOGPROB["float32"])


@dataclass(frozen=True, kw_only=True)
class Sameness:
    """The comparison of one variant with the baseline.

    Attributes:
        variant: its name.
        num_compared: outputs compared.
        mismatches: those that differ.
    """

    variant: str
    num_compared: int
    mismatches: tuple[Mismatch, ...]

    def num_near_ties(self, dtype: str) -> int:
        """Number of mismatches that rounding in this dtype can have decided."""
        return sum(mismatch.is_near_tie(dtype) for mismatch in self.mismatches)

    def to_json(self, dtype: str) -> dict[str, Any]:
        """All of it as JSON has it."""
        return {
            "variant": self.variant,
            "num_compared": self.num_compared,
            "num_mismatches": len(self.mismatches),
            "num_near_ties": self.num_near_ties(dtype),
            "mismatches": [
                {**asdict(found), "gap": found.gap, "is_near_tie": found.is_near_tie(dtype)}
                for found in self.mismatches
            ],
        }

    def in_words(self, dtype: str) -> str:
        """How many outputs differ."""
        return (
            f"{self.variant} {len(self.mismatches)} of {self.num_compared} "
            f"({self.num_near_ties(dtype)} near-ties)"
        )


def first_difference(
    baseline: Sequence[int], other: Sequence[int]
) -> tuple[int, int | None, int | None] | None:
    """Position of the first difference and the two tokens there (None past an end), or None."""
    for position, (ours, theirs) in enumerate(itertools.zip_longest(baseline, other)):
        if ours != theirs:
            return position, ours, theirs
    return None


#: Outputs by batch size, round (from 1) and place in the batch.
Outputs = Mapping[tuple[int, int, int], Sequence[int]]


def compare_outputs(
    variant: str, baseline: Outputs, outputs: Outputs, prompt_id: Callable[[int, int, int], str]
) -> Sameness:
    """Compare all outputs that both have.

    Args:
        variant: name of the variant of ``outputs``.
        baseline: the baseline's outputs.
        outputs: the variant's.
        prompt_id: id of the prompt of a batch size, round and place.
    """
    common = [key for key in outputs if key in baseline]
    mismatches = []
    for key in common:
        if (found := first_difference(baseline[key], outputs[key])) is not None:
            batch_size, number, _ = key
            position, ours, theirs = found
            mismatches.append(
                Mismatch(
                    variant=variant,
                    batch_size=batch_size,
                    round=number,
                    prompt_id=prompt_id(*key),
                    position=position,
                    baseline_token=ours,
                    variant_token=theirs,
                )
            )
    return Sameness(variant=variant, num_compared=len(common), mismatches=tuple(mismatches))
