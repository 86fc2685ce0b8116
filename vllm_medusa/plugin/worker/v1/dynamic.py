"""Dynamic trees: a new tree for each request in each step, of the nodes that pay.

`vllm_medusa.draft` has the sources of candidates, gives each node its probability and chooses nodes
over the whole batch. This file connects it to the runner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vllm.distributed import get_tensor_model_parallel_world_size

from vllm_medusa.draft.accepted import accepted_by_source
from vllm_medusa.draft.costs import CostCurve
from vllm_medusa.draft.drafter import Drafter, DraftSettings, compile_ahead
from vllm_medusa.draft.order import depth_first
from vllm_medusa.draft.types import Drafts, Floats, Ints, Request, Source
from vllm_medusa.plugin.compat import plugin_logger
from vllm_medusa.plugin.counters import Counters
from vllm_medusa.plugin.worker.proposer import MedusaProposer
from vllm_medusa.plugin.worker.v1.drafting import NO_DRAFT, Draft, DraftingBatch

logger = plugin_logger(__name__)

#: Rows of a level that heads which run in turn compute, at least one for each request: the more
#: requests, the fewer nodes of each are drafted.
MAX_ROWS = 32

_SOURCES = {"heads": Source.HEADS, "text": Source.TEXT}


class _Call(NamedTuple):
    """When trees were drafted, and for which requests, if they all got some."""

    time: float
    req_ids: tuple[str, ...] | None


class DynamicDrafter:
    """Drafts the nodes of all requests that maximise the expected tokens per second.

    Args:
        proposer: has the heads; its configuration has dynamic trees.
        costs: step costs; None: as many nodes as the limits allow.
        counters: count what was drafted.

    """

    def __init__(
        self, proposer: MedusaProposer, costs: CostCurve | None, counters: Counters
    ) -> None:
        trees = proposer.config.dynamic
        assert trees is not None
        shared = Source.SHARED_TEXT if trees.shared_text else 0
        settings = DraftSettings(
            sources=Source(sum(_SOURCES[name] for name in trees.sources) | shared),
            max_nodes=trees.max_nodes,
            max_depth=trees.max_depth,
            learn=trees.learn,
        )
        compile_ahead()
        self._proposer = proposer
        self._counters = counters
        self._drafter = Drafter(
            settings,
            proposer.probabilities(),
            costs,
            by_parent=proposer.by_parent,
            num_levels=proposer.num_levels,
        )
        # The last drafts of each request: the drafts of that step, and the request's place in them.
        self._drafted: dict[str, tuple[Drafts, int]] = {}
        # Tensor-parallel ranks measure different times and would draft different trees.
        self._learns_times = get_tensor_model_parallel_world_size() == 1
        if costs is not None and not self._learns_times:
            logger.info("Medusa: with tensor parallelism trees do not learn from times of steps")
        self._last = _Call(0.0, None)

    def num_paths(self, batch_size: int) -> int:
        """Return the most fork paths of a tree."""
        return self._proposer.config.limits.max_paths

    def finish(self, req_ids: Iterable[str]) -> None:
        """Drop the data of requests that have ended."""
        for req_id in req_ids:
            self._drafter.finish(req_id)
            self._drafted.pop(req_id, None)

    def draft(self, batch: DraftingBatch) -> list[Draft]:
        """Return a tree for each request."""
        if not any(batch.max_nodes):
            self._last = _Call(0.0, None)
            return [NO_DRAFT] * len(batch.req_ids)
        places = [place for place, sampled in enumerate(batch.sampled) if sampled]
        requests = [
            Request(
                key=batch.req_ids[place],
                tokens=batch.texts[place],
                num_prompt_tokens=batch.num_prompt_tokens[place],
                max_nodes=batch.max_nodes[place],
                max_leaves=batch.max_paths[place],
            )
            for place in places
        ]
        self._count_accepted(batch, places)
        guessed, step_ms = self._guess(batch, places), self._step_ms(batch, places)
        drafts = depth_first(self._drafter.propose(requests, guessed, step_ms))
        self._count_drafted(drafts)
        chosen = [NO_DRAFT] * len(batch.req_ids)
        starts, tokens, parents = (
            values.tolist() for values in (drafts.starts, drafts.tokens, drafts.parents)
        )
        for row, place in enumerate(places):
            nodes = slice(starts[row], starts[row + 1])
            chosen[place] = Draft(tokens[nodes], tuple(parents[nodes]))
            self._drafted[batch.req_ids[place]] = (drafts, row)
        return chosen

    def last_probabilities_and_sources(self, req_id: str) -> tuple[list[float], list[list[str]]]:
        """Return path probabilities and sources of the nodes that a request drafted last."""
        drafts, row = self._drafted[req_id]
        draft = drafts[row]
        names = [[str(s.name).lower() for s in Source if bits & s] for bits in draft.source]
        return draft.probability.tolist(), names

    def _step_ms(self, batch: DraftingBatch, places: list[int]) -> float | None:
        """Return the time since the last call, if only the step of its drafts ran in it."""
        last, is_all = self._last, len(places) == len(batch.req_ids)
        self._last = _Call(time.perf_counter(), tuple(batch.req_ids) if is_all else None)
        if not (self._learns_times and is_all and last.req_ids == self._last.req_ids):
            return None
        return 1000 * (self._last.time - last.time)

    def _guess(self, batch: DraftingBatch, places: list[int]) -> tuple[Ints, Floats] | None:
        """Run the heads if they are likely to pay."""
        if not places:
            return None
        max_rows = MAX_ROWS if self._drafter.may_fork(len(places)) else 1
        num_levels = self._drafter.levels(len(places))
        if num_levels == 0:
            return None
        self._counters.heads_runs += 1
        log_probs, tokens = self._proposer.probable_guesses(
            *batch.inputs_of_heads(places), max_rows=max_rows, num_levels=num_levels
        )
        return (
            tokens.transpose(0, 1).cpu().numpy(),
            log_probs.transpose(0, 1).double().exp().cpu().numpy(),
        )

    def _count_accepted(self, batch: DraftingBatch, places: list[int]) -> None:
        """Count the nodes of the last drafts that the step accepted, by source."""
        # All requests drafted in the same step, except those that were not in a later step.
        steps: dict[int, tuple[Drafts, list[int], list[Sequence[int]]]] = {}
        for place in places:
            if accepted := batch.sampled[place][:-1]:
                drafts, row = self._drafted[batch.req_ids[place]]
                _, rows, tokens = steps.setdefault(id(drafts), (drafts, [], []))
                rows.append(row)
                tokens.append(accepted)
        for step in steps.values():
            counts = accepted_by_source(*step)
            self._counters.heads_accepted += counts[Source.HEADS]
            self._counters.text_accepted += counts[Source.TEXT]
            self._counters.shared_text_accepted += counts[Source.SHARED_TEXT]

    def _count_drafted(self, drafts: Drafts) -> None:
        if not len(drafts.tokens):
            self._counters.steps_without_drafts += 1
            return
        by_heads, by_text, by_shared_text = (
            int((drafts.source & source > 0).sum())
            for source in (Source.HEADS, Source.TEXT, Source.SHARED_TEXT)
        )
        self._counters.nodes_drafted += len(drafts.tokens)
        self._counters.heads_nodes += by_heads
        self._counters.text_nodes += by_text
        self._counters.shared_text_nodes += by_shared_text
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "Medusa: trees of %s nodes; %d from the heads, %d from text, %d from shared text; "
                "%.2f tokens expected",
                drafts.num_nodes.tolist(),
                by_heads,
                by_text,
                by_shared_text,
                len(drafts) + drafts.probability.sum(),
            )
