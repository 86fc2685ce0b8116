"""The drafter from step to step."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from vllm_medusa.draft.costs import CostCurve
from vllm_medusa.draft.drafter import Drafter, DraftSettings, compile_ahead
from vllm_medusa.draft.probability import Probabilities
from vllm_medusa.draft.replay import GuessedText, num_accepted, replay
from vllm_medusa.draft.types import Drafts, Request, Source

K, GUESSES = 3, 4


def text(seed: int, length: int = 120) -> GuessedText:
    """A text that repeats itself; of the heads' guesses the likelier are the more often right."""
    random = np.random.default_rng(seed)
    tokens: list[int] = random.integers(0, 50, 10).tolist()
    while len(tokens) < length + K:
        if random.random() < 0.4:
            start = int(random.integers(0, len(tokens) - 4))
            tokens += tokens[start : start + 6]
        else:
            tokens += random.integers(0, 50, 2).tolist()
    num_positions = length - 10
    guessed = np.zeros((num_positions, K, GUESSES), dtype=np.int64)
    for position in range(num_positions):
        for head in range(K):
            others = random.permutation(50)[:GUESSES]
            right = tokens[10 + position + 1 + head]
            others[others == right] = 50
            if random.random() < 0.6:
                others[int(random.choice(GUESSES, p=[0.6, 0.2, 0.1, 0.1]))] = right
            guessed[position, head] = others
    probability = np.broadcast_to([0.5, 0.15, 0.07, 0.05], guessed.shape)
    return GuessedText(np.array(tokens), 10, guessed, probability, num_positions)


TEXTS = [text(seed) for seed in range(6)]


def drafter(costs: CostCurve | None = None, **settings: Any) -> Drafter:
    return Drafter(DraftSettings(**settings), Probabilities.default(K, GUESSES), costs)


def request_of(key: str, tokens: list[int], max_nodes: int | None = None) -> Request:
    return Request(key, np.array(tokens), 0, max_nodes)


def as_lists(drafts: Drafts) -> list[list[Any]]:
    return [drafts.tokens.tolist(), drafts.parents.tolist(), drafts.probability.tolist()]


@pytest.mark.parametrize("sources", [Source.HEADS, Source.TEXT, Source.HEADS | Source.TEXT])
def test_more_nodes_accept_more(sources: Source) -> None:
    lengths = [
        replay(TEXTS, drafter(sources=sources, max_nodes=nodes)).tokens_per_step
        for nodes in (1, 4, 16)
    ]
    assert 1 < lengths[0] < lengths[1] < lengths[2]
    assert lengths[-1] > 1.3


def test_two_sources_accept_more_than_one() -> None:
    both, heads, text_only = (
        replay(TEXTS, drafter(sources=sources, max_nodes=8)).tokens_per_step
        for sources in (Source.HEADS | Source.TEXT, Source.HEADS, Source.TEXT)
    )
    assert both > max(heads, text_only)


def test_drafts_are_the_same_again_and_alone() -> None:
    """What a request drafts without a budget does not depend on the others in its batch."""
    settings = {"max_nodes": 8, "learn": False}
    first, again = (replay(TEXTS, drafter(**settings)) for _ in range(2))
    assert first == again
    alone = replay(TEXTS, drafter(**settings), batch_size=1)
    assert (alone.num_tokens, alone.num_requests) == (first.num_tokens, first.num_requests)


def test_learning_is_deterministic_and_can_be_switched_off() -> None:
    costs = CostCurve({1: [(1, 10), (65, 20)]})
    learned = [Probabilities.default(K, GUESSES) for _ in range(2)]
    runs = [
        [
            replay(TEXTS, Drafter(DraftSettings(max_nodes=8), p, costs), batch_size=1)
            for _ in range(3)
        ]
        for p in learned
    ]
    assert runs[0] == runs[1]
    assert (
        learned[0].to_dict() == learned[1].to_dict() != Probabilities.default(K, GUESSES).to_dict()
    )
    fixed = Probabilities.default(K, GUESSES)
    replay(TEXTS * 3, Drafter(DraftSettings(learn=False), fixed, costs), batch_size=1)
    assert fixed.to_dict() == Probabilities.default(K, GUESSES).to_dict()


def test_bounds() -> None:
    made = drafter(max_nodes=12, max_depth=2, max_leaves=3, sources=Source.HEADS | Source.TEXT)
    tokens = [1, 2, 3, 4, 1, 2, 5, 6, 1, 2]
    guesses = (np.arange(24).reshape(2, K, GUESSES) + 10, np.full((2, K, GUESSES), 0.2))
    full, small = made.propose(
        [request_of("a", tokens), request_of("b", tokens, max_nodes=2)], guesses
    )
    assert 3 <= len(full) <= 12
    assert len(small) == 2
    assert full.depths.max() == 2
    inner = set(full.parents.tolist())
    assert sum(node not in inner for node in range(1, len(full) + 1)) <= 3
    off = made.propose([request_of("c", tokens, max_nodes=0)], None)
    assert [len(draft) for draft in off] == [0]


def test_sources_are_named() -> None:
    tokens = [1, 2, 3, 4, 1, 2]  # 3 4 1 2 followed
    guessed = np.array([[[3, 9, 8, 7], [5, 9, 8, 7], [6, 9, 8, 7]]])
    guesses = (guessed, np.array([[[0.6, 0.1, 0.1, 0.1]] * K]))
    draft = drafter(max_nodes=16).propose([request_of("a", tokens)], guesses)[0]
    named = {}
    paths: list[tuple[int, ...]] = [()]
    for token, parent, source in zip(draft.tokens, draft.parents, draft.source, strict=True):
        paths.append((*paths[parent], int(token)))
        named[paths[-1]] = Source(int(source))
    assert named[3,] == Source.HEADS | Source.TEXT
    assert named[9,] == Source.HEADS
    assert named[3, 4] == Source.TEXT
    assert named[3, 5] == Source.HEADS


def test_nothing_is_drafted_where_nothing_pays() -> None:
    dear = CostCurve({1: [(1, 10), (2, 30), (17, 300)]}, heads=[(1, 1.0)])
    made = drafter(dear, max_nodes=16)
    replayed = replay(TEXTS, made, batch_size=1)
    # But now and then, to see whether it would.
    drafted = [step for step, (_, nodes, _, _) in enumerate(replayed.steps) if nodes]
    assert 0 < len(drafted) < len(replayed.steps) / 20
    heads = [runs for *_, runs in replayed.steps]
    assert sum(heads[64:]) < len(heads[64:]) / 10


def test_heads_that_are_surer_of_the_text_run() -> None:
    """What they would bring is judged by the text's probabilities without them."""
    costs = CostCurve({1: [(1, 10), (2, 13), (17, 90)]}, heads=[(1, 1.0)])
    text_only = drafter(costs, sources=Source.TEXT, learn=False)
    made = drafter(costs, learn=False)
    request = request_of("a", [1, 2, 3, 4, 1, 2])  # 3 followed
    guessed = np.arange(K * GUESSES).reshape(1, K, GUESSES) + 10
    guessed[0, 0, 0] = 3
    sure = np.full(guessed.shape, 0.01)
    sure[0, 0, 0] = 0.95
    for _ in range(100):
        assert made.levels(1) == 1
        (draft,) = made.propose([request], (guessed, sure))
    assert (draft.tokens[0], draft.source[0]) == (3, Source.HEADS | Source.TEXT)
    (without,) = text_only.propose([request])
    assert all(without.probability < draft.probability[0])


def test_a_rival_of_the_other_source_makes_a_token_less_likely() -> None:
    request = request_of("a", [1, 2, 3, 4, 1, 2])  # 3 followed
    guessed, given = (
        np.arange(K * GUESSES).reshape(1, K, GUESSES) + 10,
        np.full((1, K, GUESSES), 0.01),
    )
    given[0, 0, 0] = 0.9

    def probability(first_guess: int, *, is_text: bool = True) -> dict[int, float]:
        guessed[0, 0, 0] = first_guess
        tokens = request if is_text else request_of("b", [7, 8])
        (draft,) = drafter(max_nodes=16).propose([tokens], (guessed, given))
        at_root = draft.parents == 0
        return dict(zip(draft.tokens[at_root].tolist(), draft.probability[at_root], strict=True))

    text_alone = drafter(sources=Source.TEXT).propose([request])[0].probability[0]
    heads_alone = probability(3, is_text=False)[3]
    assert probability(3)[3] > max(text_alone, heads_alone)
    rivals = probability(9)
    assert rivals[3] < text_alone
    assert rivals[9] < heads_alone


def test_cheap_nodes_are_all_drafted() -> None:
    flat = CostCurve({1: [(1, 10), (129, 10.0001)]})
    made, unlimited = drafter(flat, max_nodes=8), drafter(max_nodes=8)
    assert replay(TEXTS, made).num_requests == replay(TEXTS, unlimited).num_requests


def test_requests_come_and_go() -> None:
    made = drafter(max_nodes=4)
    assert len(made.propose([])) == 0
    repeated = [1, 2, 3, 4, 5] * 4
    assert len(made.propose([request_of("a", repeated)])[0]) == 4
    # It was away for a step, was preempted and began anew, or another has its name.
    made.propose([request_of("b", [7, 8])])
    assert len(made.propose([request_of("a", [*repeated, 1, 2])])[0]) == 4
    assert len(made.propose([request_of("a", [9, 8, 7])])[0]) == 0
    made.finish("a")
    made.finish("never seen")
    assert len(made.propose([request_of("a", repeated)])[0]) == 4


def test_heads_are_asked_for_if_they_are_a_source() -> None:
    assert drafter().levels(1) == 1
    assert drafter(sources=Source.TEXT).levels(1) == 0


def test_accepted_nodes() -> None:
    drafts = Drafts(
        tokens=np.array([5, 6, 7, 8]),
        parents=np.array([0, 0, 2, 3]),
        depths=np.array([1, 1, 2, 3]),
        probability=np.array([0.5, 0.4, 0.3, 0.2]),
        source=np.ones(4, dtype=np.int64),
        starts=np.array([0, 4]),
    )
    for following, count in (([6, 7, 8, 9], 3), ([6, 7], 2), ([5, 7], 1), ([9], 0), ([], 0)):
        assert num_accepted(drafts[0], np.array(following, dtype=np.int64)) == count


CALLED_BY_LOOPS = {
    *("along_paths", "build_trie", "match_lengths", "outcomes", "predict", "text_features"),
    *("_choose", "_hash", "_largest", "_likely", "_tables_along", "_match"),
    *("_along", "_predict", "_within_bounds"),
    *("agree", "log_odds", "sigmoid"),
}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_all_is_compiled_ahead(batch_size: int) -> None:
    """A layout or type that first comes up while serving would hold up that step by a second."""
    loops = [
        value
        for name, module in sys.modules.items()
        if name.startswith("vllm_medusa.draft")
        for value in vars(module).values()
        if hasattr(value, "signatures")
    ]
    compile_ahead()
    before = [list(loop.signatures) for loop in loops]
    # Of loops that only others call there are none if what calls them was kept on the disk.
    untyped = {loop.__name__ for loop, known in zip(loops, before, strict=True) if not known}
    assert untyped <= CALLED_BY_LOOPS
    replay(TEXTS, drafter(CostCurve({1: [(1, 10), (65, 12)]})), batch_size)
    assert [list(loop.signatures) for loop in loops] == before


def test_slow_requests_draft_more_nodes() -> None:
    """Two texts that go on alike, of which one has gone on slowly."""
    costs = CostCurve({2: [(2 + nodes, 10 + 4 * nodes) for nodes in range(33)]})
    cycle = [1, 2, 3, 4, 5]
    nodes = []
    for new in (1, 4):
        made = drafter(costs, sources=Source.TEXT, learn=False)
        slow, fast = cycle * 6, cycle * 6
        for _ in range(30):
            slow, fast = (
                [*text, *(cycle * 2)[len(text) % 5 :][:n]] for text, n in ((slow, 1), (fast, new))
            )
            drafts = made.propose([request_of("slow", slow), request_of("fast", fast)])
        nodes.append(drafts.num_nodes.tolist())
    (alike, other), (slower, faster) = nodes
    assert alike == other
    assert slower > alike
    assert faster < other


def test_overhead_makes_more_nodes_pay() -> None:
    """But a machine that is slower as a whole changes nothing."""
    costs = CostCurve({1: [(1 + nodes, 10 + 3 * nodes) for nodes in range(17)]})

    def nodes_per_step(constant: float, factor: float) -> float:
        def step_ms(num_requests: int, nodes: int, _: int) -> float:
            expected = costs.by_drafts(num_requests, nodes)[nodes]
            return float(constant + factor * expected)

        made = drafter(costs, sources=Source.TEXT, learn=False)
        steps = replay(TEXTS, made, batch_size=1, step_ms=step_ms).steps[64:]
        return sum(nodes for _, nodes, _, _ in steps) / len(steps)

    alone = nodes_per_step(0, 1)
    assert nodes_per_step(0, 1.7) == pytest.approx(alone, rel=0.05)
    assert nodes_per_step(10, 1) > 1.2 * alone


def test_forks_that_take_long_are_not_drafted() -> None:
    """What steps with forks take is compared with what those without take."""
    costs = CostCurve({1: [(1, 10), (33, 13)]}, heads=[(1, 1.0)])

    def share_of_forks(forking_ms: float) -> float:
        def step_ms(_: int, nodes: int, forks: int) -> float:
            return 12 + nodes * 3 / 32 + (forking_ms if forks else 0)

        made = drafter(costs, max_nodes=16)
        steps = replay(TEXTS, made, batch_size=1, step_ms=step_ms).steps[64:]
        return sum(forks > 0 for _, _, forks, _ in steps) / len(steps)

    assert share_of_forks(0) > 0.8
    assert share_of_forks(8) < 0.2


@pytest.mark.parametrize(("heads_ms", "expected"), [(0.01, K), (6.0, 1), (60.0, 0)])
def test_levels_that_do_not_pay_do_not_run(heads_ms: float, expected: int) -> None:
    """The guesses of the first level are mostly right, those of the others hardly."""
    costs = CostCurve({1: [(1, 10), (33, 12)]}, heads=[(1, heads_ms)])
    settings = DraftSettings(sources=Source.HEADS, learn=False)
    made = Drafter(settings, Probabilities.default(K, GUESSES), costs, num_levels=K)
    tokens = np.arange(K * GUESSES).reshape(1, K, GUESSES)
    probability = np.full((1, K, GUESSES), 0.01)
    probability[0, 0, 0], probability[0, 1:, 0] = 0.9, 0.2
    levels = []
    for length in range(100, 300):
        levels.append(made.levels(1))
        guesses = probability.copy()
        guesses[:, levels[-1] :] = 0
        guessed = (tokens, guesses) if levels[-1] else None
        made.propose([request_of("", list(range(length)))], guessed)
    assert levels[:32] == [K] * 32
    assert max(set(levels[32:]), key=levels[32:].count) == expected
