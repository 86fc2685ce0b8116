"""Measures heads in training on held-out rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from vllm_medusa.acceptance.intervals import by_prompt, ratio, resample
from vllm_medusa.acceptance.ranks import Continuation
from vllm_medusa.acceptance.statistics import Ranks, head_accuracy, position_average, step_counts
from vllm_medusa.acceptance.texts import Text, counted_positions, text_of_row
from vllm_medusa.acceptance.trees import best_paths
from vllm_medusa.data.rows import Row
from vllm_medusa.errors import UserError
from vllm_medusa.tree.draft_tree import DraftTree, TreePath

TREE_SIZES = (4, 8, 16, 24, 32, 48, 64)
#: Heads are chosen by the expected acceptance length of the best tree of this many nodes, a usual
#: size.
CHOSEN_BY = 32


def measurable_texts(
    rows: Sequence[Row],
    end_tokens: Collection[int],
    num_heads: int,
    *,
    temperature: float,
    setting: str,
) -> list[Text]:
    """Return rows as texts to measure heads on.

    Args:
        rows: with answers.
        end_tokens: of the target.
        num_heads: of the heads.
        temperature: of the answers.
        setting: that gives these rows, as the user knows it.

    Raises:
        UserError: they have no position that counts.
    """
    texts = [text_of_row(row, end_tokens, temperature) for row in rows]
    answers = [(text, answer) for text in texts for answer in text.answers]
    if not any(
        counted_positions(text.tokens_of(answer), answer.has_ended, num_heads).total
        for text, answer in answers
    ):
        raise UserError(
            f"{setting}: none of its {len(answers)} answers is long enough to measure {num_heads} "
            f"heads on, which takes {num_heads + 2} tokens, or 2 if the target ended the answer; "
            "give more rows or longer answers"
        )
    return texts


def expected_acceptance(continuations: Sequence[Continuation]) -> float:
    """Return the acceptance length to choose heads by, see `CHOSEN_BY`."""
    ranks = [item.ranks for item in continuations]
    return position_average(ranks, best_paths(ranks, CHOSEN_BY))


def summary(continuations: Sequence[Continuation], paths: Sequence[TreePath]) -> dict[str, Any]:
    """Return accuracy and acceptance lengths with their intervals.

    Args:
        continuations: the answers.
        paths: the most probable paths, most probable first.

    Returns:
        `with_loops` and `without_loops`: figures with and without looping text; and, if prompts
        have categories, `categories`: the same for those of each category.
    """
    names = sorted({item.category for item in continuations if item.category is not None})
    by_category = {
        name: _with_and_without_loops(
            [item for item in continuations if item.category == name], paths
        )
        for name in names
    }
    figures = _with_and_without_loops(continuations, paths)
    return {**figures, "categories": by_category} if by_category else figures


def _with_and_without_loops(
    continuations: Sequence[Continuation], paths: Sequence[TreePath]
) -> dict[str, Any]:
    prompt_ids = [item.prompt_id for item in continuations]
    return {
        name: _figures(
            [item.ranks_of(with_loops=with_loops) for item in continuations], prompt_ids, paths
        )
        for name, with_loops in (("with_loops", True), ("without_loops", False))
    }


def _figures(
    ranks: list[Ranks], prompt_ids: Sequence[str], paths: Sequence[TreePath]
) -> dict[str, Any]:
    num_heads = ranks[0].shape[1]
    trees: dict[str, Sequence[TreePath]] = {
        f"chain of {num_heads}": DraftTree.chain(num_heads).paths
    }
    # At most the paths that were ever right.
    trees |= {f"tree of {size}": paths[:size] for size in TREE_SIZES if size <= len(paths)}
    resamples = resample(len(set(prompt_ids)), seed=0)
    lengths = {
        name: ratio(by_prompt(step_counts(ranks, tree), prompt_ids), resamples)
        for name, tree in trees.items()
    }
    accuracy = head_accuracy(ranks)
    return {
        "prompts": len(set(prompt_ids)),
        "positions": sum(map(len, ranks)),
        "accuracy": {f"top-{top}": [round(x, 4) for x in accuracy[top]] for top in accuracy},
        "acceptance_length": {name: round(found.value, 4) for name, found in lengths.items()},
        "interval": {
            name: [round(found.low, 4), round(found.high, 4)] for name, found in lengths.items()
        },
    }
