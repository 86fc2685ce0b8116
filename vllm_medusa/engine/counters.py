"""What the plugin counts besides vLLM's own speculative-decoding metrics."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass
class Counters:
    """Totals of one worker since it started.

    Attributes:
        forked_requests: request steps that verified more than one leaf path.
        fork_paths: leaf paths verified in fork blocks.
        commits: request steps that accepted a path other than the first.
        chain_fallbacks: drafts cut to the first path because no fork blocks were free.

    """

    forked_requests: int = 0
    fork_paths: int = 0
    commits: int = 0
    chain_fallbacks: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the totals by name."""
        return dataclasses.asdict(self)
