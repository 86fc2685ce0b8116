"""Write down what an engine does, step by step: for `demo.py`, in the engine's own process.

The file that $WATCH_STEPS names gets a line of JSON for each event: ``{"text", "num_tokens"}`` when
a step gave the request new text, ``{"root", "tokens", "parents", "sampled"}`` when a step has
verified a draft tree.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vllm.v1.engine.llm_engine import LLMEngine

from vllm_medusa.plugin.worker.v1.drafting import Draft, Drafter, DraftingBatch
from vllm_medusa.plugin.worker.v1.runner import MedusaRunnerMixin

# Closed by the end of the process; each line is there as soon as it is written.
LOG = Path(os.environ["WATCH_STEPS"]).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115


def write(**event: Any) -> None:
    """Write one event."""
    LOG.write(json.dumps(event) + "\n")


class WatchedDrafter:
    """Writes down each tree that a drafter drew, when it is known what the target sampled."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._drafted: dict[str, tuple[int, Draft]] = {}

    def __getattr__(self, name: str) -> Any:
        """All but drafting is left to the drafter."""
        return getattr(self._drafter, name)

    def draft(self, batch: DraftingBatch) -> list[Draft]:
        """Draft the next trees; write down what became of the last ones."""
        drafts = self._drafter.draft(batch)
        for req_id, sampled, draft in zip(batch.req_ids, batch.sampled, drafts, strict=True):
            if req_id in self._drafted:
                root, last = self._drafted.pop(req_id)
                write(root=root, tokens=last.tokens, parents=last.parents, sampled=[*sampled])
            if sampled and draft.tokens:
                self._drafted[req_id] = (int(sampled[-1]), draft)
        return drafts


def watch_drafts() -> None:
    """Have every runner draft through a `WatchedDrafter`, once it has its drafter."""
    original = MedusaRunnerMixin.prepare_drafting

    def prepare_drafting(self: Any) -> None:
        original(self)
        self.tree_drafter = WatchedDrafter(self.tree_drafter)

    MedusaRunnerMixin.prepare_drafting = prepare_drafting


def watch_text() -> None:
    """Write down the text of every step."""
    original = LLMEngine.step

    def step(self: Any) -> Any:
        outputs = original(self)
        for output in outputs:
            delta = output.outputs[0]
            write(text=delta.text, num_tokens=len(delta.token_ids))
        return outputs

    LLMEngine.step = step


watch_drafts()
watch_text()
