"""Data sets that finished heads are measured on (`--test-data`).

Their prompts are none of those that the heads learnt from, that chose the best heads, or that the
trees were made from.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_medusa.acceptance.texts import Text
from vllm_medusa.data.rows import Row, temperature_of
from vllm_medusa.errors import UserError
from vllm_medusa.target.frozen import FrozenTarget
from vllm_medusa.training.dataset import Dataset, fingerprint_of, fitting_rows
from vllm_medusa.training.evaluate import measurable_texts

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class TestSet:
    """One data set to measure on.

    Attributes:
        name: its directory, as the user gave it.
        temperature: at which its answers were sampled; 0 is greedy.
        texts: its rows.
        num_known: rows left out because the training's own data has their prompts too.
        fingerprint: hash of all tokens and masks that are used, in order.
    """

    __test__ = False  # no class of tests, whatever pytest makes of its name

    name: str
    temperature: float
    texts: list[Text]
    num_known: int
    fingerprint: str


def load_test_sets(
    paths: Sequence[Path],
    dataset: Dataset,
    target: FrozenTarget,
    end_tokens: Collection[int],
    num_heads: int,
) -> list[TestSet]:
    """Read and check the data sets to measure on.

    Args:
        paths: their directories.
        dataset: rows of the training, whose prompts are left out.
        target: that the rows must fit.
        end_tokens: of the target.
        num_heads: of the heads.

    Raises:
        UserError: rows that cannot be used, or none that is left to measure on.
    """
    known = {_prompt_of(row) for row in (*dataset.train, *dataset.held_out)} if paths else set()
    return [_load(path, known, target, end_tokens, num_heads) for path in paths]


def _load(
    path: Path,
    known: Collection[bytes],
    target: FrozenTarget,
    end_tokens: Collection[int],
    num_heads: int,
) -> TestSet:
    found = fitting_rows(path, vocab_size=target.vocab_size, max_tokens=target.max_tokens)
    rows = [row for row, _ in found]
    new = [row for row in rows if _prompt_of(row) not in known]
    num_known = len(rows) - len(new)
    if not new:
        raise UserError(
            f"--test-data {path}: --data has the prompts of all {len(rows)} rows too; give answers "
            "to other prompts"
        )
    if num_known:
        _LOGGER.warning(
            "--test-data %s: %d of %d rows left out, because --data has their prompts too",
            path,
            num_known,
            len(rows),
        )
    temperature = temperature_of(path)
    texts = measurable_texts(
        new, end_tokens, num_heads, temperature=temperature, setting=f"--test-data {path}"
    )
    return TestSet(str(path), temperature, texts, num_known, fingerprint_of(new))


def _prompt_of(row: Row) -> bytes:
    """The tokens before a row's first answer; of a row without prompt all of them."""
    first = int(row.loss_mask.argmax()) or len(row.token_ids)
    return hashlib.sha256(row.token_ids[:first].tobytes()).digest()
