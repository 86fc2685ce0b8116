"""Writes the events of an engine, step by step, in its own process.

A file gets a line of JSON for each event. When a step gave a request new text, this is
``{"text", "num_tokens"}``. When a step has verified a draft tree, it has the fields of
`reporting.tree_pictures.VerifiedTree`. Trees are written on Model Runner V1 only.
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
    """Let all engines that this process makes from now on write their events to a file."""
    # Closed at the end of the process; each line is flushed at once.
    log = path.open("a", buffering=1, encoding="utf-8")

    def write(event: dict[str, Any]) -> None:
        log.write(json.dumps(event) + "\n")

    _watch_drafts(write)
    _watch_text(write)


class _WatchedDrafter:
    """Writes each tree of a drafter, once the target's tokens are known."""

    def __init__(self, drafter: Drafter, write: Write) -> None:
        self._drafter = drafter
        self._write = write
        self._drafted: dict[str, dict[str, Any]] = {}
        self._num_steps = 1

    def __getattr__(self, name: str) -> Any:
        """Everything except drafting goes to the drafter."""
        return getattr(self._drafter, name)

    def draft(self, batch: DraftingBatch) -> list[Draft]:
        """Draft the next trees; write the last ones with what was accepted."""
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
                    **self._probabilities_and_sources(req_id),
                }
        self._num_steps += 1
        return drafts

    def _probabilities_and_sources(self, req_id: str) -> dict[str, Any]:
        """Probabilities and sources of nodes, from a drafter of dynamic trees."""
        if not isinstance(self._drafter, DynamicDrafter):
            return {}
        probability, sources = self._drafter.last_probabilities_and_sources(req_id)
        return {"probability": probability, "sources": sources}


def _watch_drafts(write: Write) -> None:
    """Let every runner draft through a `_WatchedDrafter`, once it has its drafter."""
    original = MedusaRunnerMixin.prepare_drafting

    def prepare_drafting(self: Any) -> None:
        original(self)
        self.tree_drafter = _WatchedDrafter(self.tree_drafter, write)

    MedusaRunnerMixin.prepare_drafting = prepare_drafting  # type: ignore[method-assign]


def _watch_text(write: Write) -> None:
    """Write the text of every step."""
    original = LLMEngine.step

    def step(self: Any) -> Any:
        outputs = original(self)
        for output in outputs:
            delta = output.outputs[0]
            write({"text": delta.text, "num_tokens": len(delta.token_ids)})
        return outputs

    LLMEngine.step = step
