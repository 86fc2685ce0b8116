"""What an engine does, step by step, written down in its own process.

A file gets a line of JSON for each event: ``{"text", "num_tokens"}`` when a step gave a request new
text, and when a step has verified a draft tree the fields of a
`reporting.tree_pictures.VerifiedTree`. Trees are those of Model Runner V1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.v1.engine.llm_engine import LLMEngine

from vllm_medusa.plugin.worker.v1.drafting import Draft, Drafter, DraftingBatch
from vllm_medusa.plugin.worker.v1.dynamic import DynamicDrafter
from vllm_medusa.plugin.worker.v1.runner import MedusaRunnerMixin

#: Writes an event.
Write = Callable[[dict[str, Any]], None]


def watch_engine(path: Path) -> None:
    """Have the engines of this process, made from now on, add their events to a file."""
    # Closed by the end of the process; each line is there as soon as it is written.
    log = path.open("a", buffering=1, encoding="utf-8")

    def write(event: dict[str, Any]) -> None:
        log.write(json.dumps(event) + "\n")

    _watch_drafts(write)
    _watch_text(write)


class _WatchedDrafter:
    """Writes down each tree that a drafter drew, when it is known what the target sampled."""

    def __init__(self, drafter: Drafter, write: Write) -> None:
        self._drafter = drafter
        self._write = write
        self._drafted: dict[str, dict[str, Any]] = {}
        self._num_steps = 1

    def __getattr__(self, name: str) -> Any:
        """All but drafting is left to the drafter."""
        return getattr(self._drafter, name)

    def draft(self, batch: DraftingBatch) -> list[Draft]:
        """Draft the next trees; write down what became of the last ones."""
        drafts = self._drafter.draft(batch)
        for req_id, sampled, draft in zip(batch.req_ids, batch.sampled, drafts, strict=True):
            if req_id in self._drafted:
                self._write({**self._drafted.pop(req_id), "sampled": [*sampled]})
            if sampled and draft.tokens:
                self._drafted[req_id] = {
                    "step": self._num_steps,
                    "root": int(sampled[-1]),
                    "tokens": draft.tokens,
                    "parents": draft.parents,
                    **self._said_of(req_id),
                }
        self._num_steps += 1
        return drafts

    def _said_of(self, req_id: str) -> dict[str, Any]:
        """What a drafter of dynamic trees knows of its nodes."""
        if not isinstance(self._drafter, DynamicDrafter):
            return {}
        probability, sources = self._drafter.said_of_last(req_id)
        return {"probability": probability, "sources": sources}


def _watch_drafts(write: Write) -> None:
    """Have every runner draft through a `_WatchedDrafter`, once it has its drafter."""
    original = MedusaRunnerMixin.prepare_drafting

    def prepare_drafting(self: Any) -> None:
        original(self)
        self.tree_drafter = _WatchedDrafter(self.tree_drafter, write)

    MedusaRunnerMixin.prepare_drafting = prepare_drafting  # type: ignore[method-assign]


def _watch_text(write: Write) -> None:
    """Write down the text of every step."""
    original = LLMEngine.step

    def step(self: Any) -> Any:
        outputs = original(self)
        for output in outputs:
            delta = output.outputs[0]
            write({"text": delta.text, "num_tokens": len(delta.token_ids)})
        return outputs

    LLMEngine.step = step
