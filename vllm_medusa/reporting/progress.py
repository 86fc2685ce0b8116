"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

#: Told how many more of the things that a stage counts are done.
Progress: TypeAlias = Callable[[int], object]
