"""How far heads run, and when to draft although nothing pays."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from vllm_medusa.draft import pacing
from vllm_medusa.draft.pacing import Pacer


def run(pacer: Pacer, num_steps: int, gain: float, num_requests: int = 1) -> list[bool]:
    """Whether the heads ran in each of so many steps, each of which brings so much if they do."""
    ran = []
    for _ in range(num_steps):
        ran.append(pacer.levels(num_requests) > 0)
        if ran[-1]:
            pacer.record_rates(num_requests, np.array([1, gain]))
    return ran


def test_heads_that_pay_always_run() -> None:
    assert all(run(Pacer(), 500, gain=1.2))


def test_heads_that_do_not_pay_run_ever_more_rarely() -> None:
    ran = run(Pacer(), 5000, gain=0.9)
    at = [step for step, flag in enumerate(ran) if flag]
    trial = [step for step in at if step < 32]
    assert trial == list(range(32))
    pauses = [later - earlier for earlier, later in pairwise(at[31:])]
    assert pauses[:4] == [17, 33, 65, 129]
    assert set(pauses[4:]) == {257}


def test_heads_come_back() -> None:
    pacer = Pacer()
    run(pacer, 1000, gain=0.9)
    ran = run(pacer, 1000, gain=1.5)
    # One step after a pause of 256 at most.
    first = ran.index(True)
    assert first <= 256
    assert all(ran[first:])


def test_batch_sizes_are_apart() -> None:
    pacer = Pacer()
    run(pacer, 300, gain=0.9, num_requests=32)
    assert not all(run(pacer, 100, gain=0.9, num_requests=40))
    assert all(run(pacer, 100, gain=1.1, num_requests=1))


def test_one_bad_step_stops_nothing() -> None:
    pacer = Pacer()
    run(pacer, 100, gain=1.2)
    run(pacer, 1, gain=0.5)
    assert pacer.levels(1) == 1


def test_as_many_levels_run_as_are_best() -> None:
    pacer = Pacer(4)
    rates = np.array([0.9, 1.2, 1.3, 1.1, 1.0])
    levels = []
    for _ in range(700):
        levels.append(pacer.levels(8))
        if levels[-1] == 4:
            pacer.record_rates(8, rates)
    assert levels[:32] == [4] * 32
    # Two, except to try all of them now and then: after 16 steps, 32, 64, ...
    assert set(levels[32:700]) == {2, 4}
    assert 4 < levels[32:700].count(4) < 8


def test_drafts_now_and_then_although_nothing_pays() -> None:
    pacer = Pacer()
    anyway = [step for step in range(1, 2000) if pacer.drafts_anyway(4, 0)]
    assert anyway[:4] == [16, 48, 112, 240]
    assert {later - earlier for earlier, later in pairwise(anyway[4:])} == {256}
    assert not pacer.drafts_anyway(4, 3)
    assert [pacer.drafts_anyway(4, 0) for _ in range(16)] == [False] * 15 + [True]


def test_waits_are_short_at_first_and_bounded() -> None:
    assert pacing._SHORTEST_PAUSE < pacing._LONGEST_PAUSE <= 256


def test_forks_are_tried_with_and_without() -> None:
    pacer = Pacer()
    tries = []
    for _ in range(400):
        tries.append(pacer.may_fork(4))
        if tries[-1]:
            pacer.record_forks(4, 2)
    assert tries[:16] == [True, False] * 8
    # They pay, but what steps cost without them must stay known.
    assert 0 < tries[16:].count(False) < 10


def test_forks_that_never_pay_are_tried_now_and_then() -> None:
    pacer = Pacer()
    pays, tries = False, []
    for step in range(600):
        pays = step >= 400
        tries.append(pacer.may_fork(4))
        if tries[-1]:
            pacer.record_forks(4, int(pays))
    assert 0 < tries[100:400].count(True) < 15
    assert tries[450:].count(True) > 140
    assert pacer.may_fork(1)  # another range
