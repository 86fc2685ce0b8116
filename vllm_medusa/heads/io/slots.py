"""Where the parts of heads are stored, and whether all of them are."""

from collections.abc import Iterable
from pathlib import Path

from vllm_medusa.errors import UserError

Slot = tuple[str, tuple[int, ...]]
"""A canonical tensor's name and an index into its leading dimensions; `()` is all of it."""


def check_complete(
    location: Path, expected: Iterable[str], names: dict[str, str], what: str
) -> None:
    """Check that a checkpoint holds these tensors and no others.

    Args:
        location: the checkpoint, for messages.
        expected: names without prefix.
        names: stored names by those without prefix.
        what: the heads that have the expected tensors.

    Raises:
        UserError: tensors are missing or left over.
    """
    missing = [name for name in expected if name not in names]
    left_over = [key for name, key in names.items() if name not in set(expected)]
    if missing:
        raise UserError(
            f"{location}: tensor {_list(missing)} is missing for {what}; the checkpoint is "
            "incomplete, export the heads again"
        )
    if left_over:
        raise UserError(
            f"{location}: tensor {_list(left_over)} is no part of {what}; "
            "remove it, or export the heads again"
        )


def _list(names: list[str]) -> str:
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
