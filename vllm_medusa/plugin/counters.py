"""The plugin's counters, beside vLLM's own speculative-decoding metrics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

DESCRIPTIONS = {
    "forked_requests": "Request steps that verified more than one leaf path.",
    "fork_paths": "Leaf paths verified in fork blocks.",
    "forks_accepted": "Request steps whose accepted path ran in fork blocks.",
    "chain_fallbacks": "Drafts cut to the first path because no fork blocks were free.",
    "nodes_drafted": "Draft nodes of dynamic trees.",
    "heads_nodes": "Draft nodes of dynamic trees that the heads proposed.",
    "text_nodes": "Draft nodes of dynamic trees that the request's own text proposed.",
    "shared_text_nodes": "Draft nodes of dynamic trees that other requests' texts proposed.",
    "heads_accepted": "Accepted nodes of dynamic trees that the heads proposed.",
    "text_accepted": "Accepted nodes of dynamic trees that the request's own text proposed.",
    "shared_text_accepted": "Accepted nodes of dynamic trees that other requests' texts proposed.",
    "heads_runs": "Steps of dynamic trees that ran the heads.",
    "steps_without_drafts": "Steps of dynamic trees without drafts, because no node would pay.",
}

#: Attribute of a step's ``ModelRunnerOutput`` that takes its counts to the engine core.
OUTPUT_ATTRIBUTE = "medusa_counters"


@dataclass
class Counters:
    """Totals of one worker since it started; see `DESCRIPTIONS`."""

    forked_requests: int = 0
    fork_paths: int = 0
    forks_accepted: int = 0
    chain_fallbacks: int = 0
    nodes_drafted: int = 0
    heads_nodes: int = 0
    text_nodes: int = 0
    shared_text_nodes: int = 0
    heads_accepted: int = 0
    text_accepted: int = 0
    shared_text_accepted: int = 0
    heads_runs: int = 0
    steps_without_drafts: int = 0
    _taken: Counter[str] = field(default_factory=Counter, init=False, repr=False)

    def to_dict(self) -> dict[str, int]:
        """Return the totals by name."""
        return {name: getattr(self, name) for name in DESCRIPTIONS}

    def take_increase(self) -> dict[str, int]:
        """Return the increase since the last call, by name, without zeros."""
        before, self._taken = self._taken, Counter(self.to_dict())
        return dict(self._taken - before)
