"""Dynamic trees of a calibration: the curves of candidates, and what the trees accept.

Drafting along the texts is simulated (`draft.replay`). Below other paths than the text's, the
guesses of heads that run in turn are not known; those below the text's path stand for them. A node
there is never right, but it may be drafted in place of another one.

The curves that are written are fitted to all prompts. Every figure about them is cross-fitted, like
those of static trees: each fold of the prompts is drafted with curves and rank paths from the other
folds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_medusa.acceptance.ranks import Continuation
from vllm_medusa.acceptance.texts import counted_positions
from vllm_medusa.calibration.estimates import NUM_FOLDS
from vllm_medusa.draft.drafter import Drafter, DraftSettings
from vllm_medusa.draft.learning import Observer, Recorder, fit
from vllm_medusa.draft.probability import AGREEMENT, Probabilities, name_of
from vllm_medusa.draft.replay import GuessedText, Replayed, Tables, replay
from vllm_medusa.draft.superset import Superset
from vllm_medusa.draft.types import Floats, Ints, Source
from vllm_medusa.heads.selector import Selector, SelectorTree
from vllm_medusa.reporting.progress import Progress
from vllm_medusa.tree.draft_tree import DraftTree
from vllm_medusa.tree.layout import levels_of
from vllm_medusa.tree.limits import DynamicTrees

SIZES = (4, 8, 16)
SOURCES = (Source.HEADS, Source.TEXT)
#: The agreement curve reads the probabilities that the sources' curves give, so it is fitted last.
_CURVES = (*SOURCES, AGREEMENT)
#: Trees have the engine's default depth and number of leaves.
_BOUNDS = DynamicTrees()
_NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Candidates with about equal predicted probability.

    Attributes:
        count: of candidates.
        predicted: mean probability.
        observed: share that was right, given that the parent was right.

    """

    count: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Accepted:
    """Tokens per step of dynamic trees of one size, cross-fitted.

    Attributes:
        size: most nodes of a tree.
        with_loops, without_loops: tokens per step, over all text and over the text before loops.

    """

    size: int
    with_loops: float
    without_loops: float


@dataclass(frozen=True)
class DynamicFindings:
    """All findings about dynamic trees.

    Attributes:
        probabilities: fitted to all prompts.
        reliability: by curve, bins of the cross-fitted predictions.
        accepted: by size.

    """

    probabilities: Probabilities
    reliability: dict[str, list[Bin]]
    accepted: list[Accepted]


def measure_dynamic(
    continuations: Sequence[Continuation],
    folds: NDArray[np.int64],
    tree: DraftTree,
    progress: Progress,
    selector: Selector | None = None,
) -> DynamicFindings:
    """Fit curves, and measure them on prompts that they were not fitted to.

    Args:
        continuations: with the heads' guesses.
        folds: [continuations] of each.
        tree: the static tree beside the heads; its depth and ranks bound the heads' guesses.
        progress: counts folds.
        selector: of the heads, if they have one.

    """
    recorders = {source: Recorder() for source in _CURVES}
    replays = {(size, loops): Replayed() for size in SIZES for loops in (True, False)}
    for fold in range(NUM_FOLDS):
        inside = [continuations[i] for i in np.flatnonzero(folds == fold)]
        outside = [continuations[i] for i in np.flatnonzero(folds != fold)]
        probabilities = fit_probabilities(outside, tree, selector)
        for (size, loops), total in replays.items():
            texts = [
                guessed_text(item, tree, with_loops=loops, all_guesses=selector is not None)
                for item in inside
            ]
            observers = recorders if loops and size == max(SIZES) else {}
            replayed = _replay(texts, size, probabilities, observers, selector)
            total.num_tokens += replayed.num_tokens
            total.num_requests += replayed.num_requests
        progress(1)
    fitted = fit_probabilities(continuations, tree, selector)
    progress(1)
    return DynamicFindings(
        probabilities=fitted,
        reliability={
            name_of(source): reliability(*recorder.observations()[2:])
            for source, recorder in recorders.items()
            if len(recorder)
        },
        accepted=[
            Accepted(
                size, *(replays[size, with_loops].tokens_per_step for with_loops in (True, False))
            )
            for size in SIZES
        ],
    )


def fit_probabilities(
    continuations: Sequence[Continuation], tree: DraftTree, selector: Selector | None = None
) -> Probabilities:
    """Fit the curves of all sources to the outcomes of their candidates along the texts."""
    ranks = np.concatenate([item.ranks[:, : tree.depth] for item in continuations])
    shares = np.stack([(ranks == rank).mean(axis=0) for rank in range(tree.top_k)], axis=1)
    default = Probabilities.default(tree.depth, tree.top_k)
    probabilities = Probabilities(default.curves, Superset.from_product(shares))
    texts = [
        guessed_text(item, tree, with_loops=True, all_guesses=selector is not None)
        for item in continuations
    ]
    for sources in (SOURCES, (AGREEMENT,)):
        recorders = {source: Recorder() for source in sources}
        _replay(texts, max(SIZES), probabilities, recorders, selector)
        for source, recorder in recorders.items():
            if len(recorder):
                features, groups, _, right = recorder.observations()
                fit(probabilities.curves[source], features, groups, right)
    return probabilities


def guessed_text(
    item: Continuation, tree: DraftTree, *, with_loops: bool, all_guesses: bool = False
) -> GuessedText:
    """Return an answer to draft along, with as many guesses as the tree has ranks, or all.

    Steps begin where they are known to end before a cut, as docs/acceptance.md says, but dynamic
    trees go deeper than the heads. An answer's last token is left out: the step that reaches it
    emits it whether it was guessed or not.
    """
    guessed = item.guessed
    if guessed is None:
        raise ValueError("the ranks were measured without the heads' guesses")
    answer = guessed.tokens[guessed.num_prompt_tokens :].tolist()
    counted = counted_positions(answer, guessed.has_ended, _BOUNDS.max_depth)
    kept = slice(None), slice(tree.depth), slice(None if all_guesses else tree.top_k)
    return GuessedText(
        tokens=guessed.tokens[:-1],
        num_prompt_tokens=guessed.num_prompt_tokens,
        guessed_tokens=guessed.guesses[kept].astype(np.int64),
        guessed_probability=guessed.probability[kept].astype(np.float64),
        num_positions=counted.total if with_loops else min(counted.total, counted.before_loop),
    )


def tables_of(selector: Selector, superset: Superset) -> Tables:
    """Return the engine's tables of guesses that a selector ranks again below each parent."""
    levels = levels_of(*map(torch.from_numpy, superset.as_nodes()))
    tree = SelectorTree(selector, levels)

    @torch.inference_mode()
    def make(tokens: Ints, probability: Floats, roots: Ints) -> tuple[Ints, Floats]:
        log_probs, found = tree.probable(
            torch.from_numpy(probability).float().log().transpose(0, 1),
            torch.from_numpy(tokens).transpose(0, 1),
            torch.from_numpy(roots),
        )
        return (
            found.transpose(0, 1)[..., : superset.num_guesses].numpy(),
            log_probs.transpose(0, 1)[..., : superset.num_guesses].double().exp().numpy(),
        )

    return make


def reliability(predicted: NDArray[np.float64], right: NDArray[np.bool_]) -> list[Bin]:
    """Return the candidates by tenth of the predicted probability; empty tenths are left out."""
    places = np.minimum((predicted * _NUM_BINS).astype(np.int64), _NUM_BINS - 1)
    counts = np.bincount(places, minlength=_NUM_BINS)
    sums = np.bincount(places, predicted, _NUM_BINS), np.bincount(places, right, _NUM_BINS)
    return [
        Bin(int(counts[i]), float(sums[0][i] / counts[i]), float(sums[1][i] / counts[i]))
        for i in np.flatnonzero(counts)
    ]


def _replay(
    texts: Sequence[GuessedText],
    size: int,
    probabilities: Probabilities,
    observers: Mapping[Source, Observer],
    selector: Selector | None,
) -> Replayed:
    settings, by_parent = _settings(size), selector is not None
    drafter = Drafter(settings, probabilities, None, observers, by_parent=by_parent)
    if selector is None:
        return replay(texts, drafter)
    superset = probabilities.superset.cut_to_depth(settings.max_depth)
    return replay(texts, drafter, tables=tables_of(selector, superset))


def _settings(size: int) -> DraftSettings:
    return DraftSettings(
        max_nodes=size,
        max_leaves=_BOUNDS.max_paths,
        max_depth=min(_BOUNDS.max_depth, size),
        learn=False,
    )
