"""The README's commands that make heads run as they stand there, one after the other.

In a file of its own, because it takes long: another worker can run the other files.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.test_readme import NEW_HEADS, run_tools

pytestmark = pytest.mark.engine


def test_heads_of_ones_own(tmp_path: Path) -> None:
    assert run_tools(NEW_HEADS, tmp_path) == {"answers", "my-heads"}
