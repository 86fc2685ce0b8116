"""One engine's drafts: from the requests' texts and the heads' guesses to one tree per request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from vllm_medusa.draft.accepted import accepted_by_source
from vllm_medusa.draft.agreement import Agreement
from vllm_medusa.draft.budget import UNLIMITED, Ranked, best_rate, best_size, rank, take
from vllm_medusa.draft.costs import CostCurve
from vllm_medusa.draft.learning import LogisticCurve, Observer
from vllm_medusa.draft.merge import join, merge
from vllm_medusa.draft.order import depth_first
from vllm_medusa.draft.overhead import Overhead
from vllm_medusa.draft.pacing import Pacer
from vllm_medusa.draft.probability import AGREEMENT, Probabilities
from vllm_medusa.draft.proposer import Proposer
from vllm_medusa.draft.sources.heads import HeadsSource
from vllm_medusa.draft.sources.shared_text import SharedTextSource
from vllm_medusa.draft.sources.text import TextSource
from vllm_medusa.draft.speeds import Speeds
from vllm_medusa.draft.types import (
    Candidates,
    Drafts,
    Emitted,
    Floats,
    Ints,
    Request,
    Source,
)

#: Less probable nodes are never drafted.
_MIN_PROBABILITY = 1e-3
#: The heads' nodes that are considered, as a multiple of the nodes that can be drafted: with a
#: limit on leaves, not only the most probable nodes are taken.
_POOL = 2


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """Limits of a request's tree, and its sources.

    Attributes:
        sources: sources of the nodes.
        max_nodes: most draft nodes.
        max_leaves: most leaves.
        max_depth: deepest node.
        learn: whether the curves learn.
        max_text_tokens: of a longer text only the last tokens are searched, at least half of this
            number.
        max_shared_tokens: most tokens of finished requests' outputs kept for `SHARED_TEXT`.

    """

    sources: Source = Source.HEADS | Source.TEXT

    max_nodes: int = 16
    max_leaves: int = UNLIMITED
    max_depth: int = 16
    learn: bool = True
    max_text_tokens: int = 2**16
    max_shared_tokens: int = 2**18


class _Choice(NamedTuple):
    """How many of some nodes to draft, and [T + 1] worth per ms by their number."""

    ranked: Ranked
    size: int
    rates: Floats


class _Expected(NamedTuple):
    """What the step of the last drafts should take, without overhead, and whether it has forks."""

    ms: float
    has_forks: bool


class Drafter:
    """Drafts step by step. The same inputs in the same order give the same drafts.

    In each step: call `may_fork` and `levels`, run so many levels of the heads, call `propose`.
    Call `finish` for each request that has ended; a preempted request can continue later.

    Args:
        settings: settings of the trees.
        probabilities: curves of the sources, which learn in place.
        costs: step costs, to choose the nodes that pay; None: as many nodes as the limits allow.
        observers: by source, get the outcomes of its candidates; None: the curves learn, if the
            settings say so.
        by_parent: whether the heads' guesses depend on the token above (`Superset.by_parent`).
        num_levels: levels of the heads' tree that run one after the other; 1 if heads run at once.

    """

    def __init__(
        self,
        settings: DraftSettings,
        probabilities: Probabilities,
        costs: CostCurve | None = None,
        observers: Mapping[Source, Observer] | None = None,
        *,
        by_parent: bool = False,
        num_levels: int = 1,
    ) -> None:
        self._settings = settings
        self._costs = costs
        superset = probabilities.superset.cut_to_depth(settings.max_depth)
        self._superset = superset.by_parent() if by_parent else superset
        if observers is None:
            observers = probabilities.learners() if settings.learn else {}
        self._heads = HeadsSource(
            probabilities.curves[Source.HEADS],
            observers.get(Source.HEADS),
            self._superset,
        )
        self._agreement = Agreement(
            probabilities.curves[AGREEMENT], observers.get(AGREEMENT), self._superset
        )
        self._proposers = _proposers(settings, probabilities, observers)
        self._pacer = Pacer(num_levels)
        self._num_levels = self._levels = num_levels
        self._speeds = Speeds()
        self._overhead = Overhead()
        self._expected: _Expected | None = None
        self._may_fork = True
        # Each request's place in the last step, and the length of its text then.
        self._last: dict[str, tuple[int, int]] = {}

    def levels(self, num_requests: int) -> int:
        """Return how many levels of the heads should run for the requests of this step."""
        if Source.HEADS not in self._settings.sources or len(self._superset) == 0:
            self._levels = 0
        elif self._costs is None:
            self._levels = self._num_levels
        else:
            self._levels = self._pacer.levels(num_requests)
        return self._levels

    def may_fork(self, num_requests: int) -> bool:
        """Whether trees may have forks in this step; if not, one guess for each parent will do."""
        # Without times there is nothing to learn from steps without forks.
        is_timed = self._costs is not None and self._overhead.is_known
        self._may_fork = not is_timed or self._pacer.may_fork(num_requests)
        return self._may_fork

    def propose(
        self,
        requests: Sequence[Request],
        guessed: tuple[Ints, Floats] | None = None,
        step_ms: float | None = None,
    ) -> Drafts:
        """Draft one tree for each of B requests.

        Args:
            requests: those that sampled a token in this step.
            guessed: [B, T, k] the heads' guessed tokens, the most probable first, and their
                probabilities, in the tables of the superset; None if the heads did not run.
            step_ms: time since the last call, if nothing but the step of its drafts ran in it.

        """
        self._learn(requests)
        if step_ms is not None and self._expected is not None:
            ms, has_forks = self._expected
            self._overhead.record(len(requests), ms, step_ms, has_forks=has_forks)
        self._expected = None
        if not requests:
            return Drafts.none(0)
        others = join([proposer.propose(requests) for proposer in self._proposers])
        guesses = None if guessed is None else self._heads.guess(*guessed)
        pool = _POOL * self._settings.max_nodes
        nodes = merge(self._superset, guesses, others, pool, self._agreement)
        limits = _bounds(self._settings.max_nodes, [request.max_nodes for request in requests])
        leaves = _bounds(self._settings.max_leaves, [request.max_leaves for request in requests])
        weights = self._speeds.weights([request.key for request in requests])

        def ranked(most: Ints) -> Ranked:
            return rank(nodes, limits, most, weights=weights, min_probability=_MIN_PROBABILITY)

        if self._costs is None:
            return ranked(leaves).drafts
        levels = 0 if guesses is None else self._levels
        heads_ms = self._heads_ms(self._costs, len(requests), levels)
        best = self._best(self._costs, ranked(np.minimum(leaves, 1)), heads_ms)
        if self._may_fork and leaves.max() > 1:
            best = max(best, self._best(self._costs, ranked(leaves), heads_ms), key=_rate_of)
        if levels == self._num_levels:
            self._pacer.record_rates(len(requests), self._rates(self._costs, best, limits, others))
        return self._take(self._costs, best, heads_ms)

    def _heads_ms(self, costs: CostCurve, num_requests: int, levels: int) -> float:
        """Return the time of some levels of the heads; all take about the same."""
        return costs.heads_ms(num_requests) * levels / self._num_levels

    def _best(self, costs: CostCurve, ranked: Ranked, heads_ms: float) -> _Choice:
        """Find the best number of nodes."""
        ms = self._step_ms(costs, len(ranked.weights), len(ranked.order), heads_ms)
        forking_ms = self._overhead.forking_ms(len(ranked.weights))
        return _Choice(ranked, *best_size(ranked, ms, costs.fork_ms, forking_ms))

    def _step_ms(
        self, costs: CostCurve, num_requests: int, max_drafts: int, heads_ms: float = 0.0
    ) -> Floats:
        """Return [max_drafts + 1] what a step without forks should take, by its drafts."""
        ms = costs.by_drafts(num_requests, max_drafts) + heads_ms
        return self._overhead.corrected(num_requests, ms)

    def _rates(self, costs: CostCurve, best: _Choice, limits: Ints, others: Candidates) -> Floats:
        """Return [levels + 1] the best worth per ms by the number of the heads' levels.

        Without them candidates have their own probabilities: those that the heads have changed
        would be known only after the heads ran.
        """
        ranked, num_requests = best.ranked, len(limits)
        rates = np.empty(self._num_levels + 1)
        rates[-1] = _rate_of(best)
        ms = self._step_ms(costs, num_requests, int(limits.sum()))
        of_others = others.request, others.parents, others.probability
        rates[0] = best_rate(*of_others, limits, ranked.weights, ms)
        drafts, forking_ms = ranked.drafts, self._overhead.forking_ms(num_requests)
        of_heads = (drafts.source[ranked.order] & ~Source.HEADS) == 0
        for levels in range(1, self._num_levels):
            stays = ~of_heads | (drafts.depths[ranked.order] <= levels)
            cut = replace(ranked, order=ranked.order[stays])
            heads_ms = self._heads_ms(costs, num_requests, levels)
            ms = self._step_ms(costs, num_requests, len(cut.order), heads_ms)
            rates[levels] = best_size(cut, ms, costs.fork_ms, forking_ms)[1].max()
        return rates

    def _take(self, costs: CostCurve, best: _Choice, heads_ms: float) -> Drafts:
        """Draft the chosen nodes, and note what their step should take."""
        ranked, size, rates = best
        num_requests = len(ranked.weights)
        if self._pacer.drafts_anyway(num_requests, size) and len(rates) > 1:
            size = 1 + int(np.argmax(rates[1:]))
        num_forks = int(ranked.is_fork[ranked.order[:size]].sum())
        if self._may_fork:
            self._pacer.record_forks(num_requests, num_forks)
        ms = costs.by_drafts(num_requests, size)[-1] + costs.fork_ms * num_forks + heads_ms
        self._expected = _Expected(float(ms), num_forks > 0)
        return take(ranked, size)

    def finish(self, key: str) -> None:
        """Drop the data of a request that has ended."""
        self._speeds.finish(key)
        for proposer in self._proposers:
            proposer.finish(key)

    def _learn(self, requests: Sequence[Request]) -> None:
        """Show all sources what followed the texts of the last step."""
        depth = self._settings.max_depth
        tokens = np.zeros((max(1, len(self._last)), depth), dtype=np.int64)
        counts = np.zeros(len(tokens), dtype=np.int64)
        for request in requests:
            place, length = self._last.get(request.key, (0, len(request.tokens)))
            new = request.tokens[length : length + depth]
            if len(new):
                self._speeds.record(request.key, len(request.tokens) - length)
                tokens[place, : len(new)] = new
                counts[place] = len(new)
        emitted = Emitted(tokens, counts)
        self._heads.learn(emitted)
        self._agreement.learn(emitted)
        for proposer in self._proposers:
            proposer.learn(emitted)
        self._last = {r.key: (place, len(r.tokens)) for place, r in enumerate(requests)}


def compile_ahead() -> None:
    """Draft once, so that no request waits for code that is compiled at its first run."""
    num_heads, num_guesses = 2, 2
    probabilities = Probabilities.default(num_heads, num_guesses)
    costs = CostCurve({1: [(1, 1.0), (3, 1.0), (4, 9.0)]})
    drafter = Drafter(DraftSettings(max_nodes=4), probabilities, costs)
    text = np.array([1, 2, 3, 1, 2, 3, 1, 2], dtype=np.int32)
    tokens = np.arange(num_heads * num_guesses).reshape(1, num_heads, num_guesses)
    guesses = tokens.astype(np.int64), np.full(tokens.shape, 0.1)
    for stop, guessed in ((5, guesses), (7, None), (8, None)):
        drafts = depth_first(drafter.propose([Request("", text[:stop], 3)], guessed))
        accepted_by_source(drafts, [0], [[]])


def _rate_of(choice: _Choice) -> float:
    return float(choice.rates[choice.size])


def _bounds(most: int, wanted: Sequence[int | None]) -> Ints:
    """Return the limits of requests, each the engine's or a smaller one of its own (or None)."""
    return np.array([most if w is None or w > most else w for w in wanted], dtype=np.int64)


def _proposers(
    settings: DraftSettings, probabilities: Probabilities, observers: Mapping[Source, Observer]
) -> tuple[Proposer, ...]:
    """Make the sources other than the heads."""
    curves, depth = probabilities.curves, settings.max_depth
    made: dict[Source, Callable[[LogisticCurve, Observer | None], Proposer]] = {
        Source.TEXT: lambda curve, observer: TextSource(
            curve, observer, max_depth=depth, max_tokens=settings.max_text_tokens
        ),
        Source.SHARED_TEXT: lambda curve, observer: SharedTextSource(
            curve, observer, max_depth=depth, max_tokens=settings.max_shared_tokens
        ),
    }
    return tuple(
        make(curves[source], observers.get(source))
        for source, make in made.items()
        if source in settings.sources
    )
