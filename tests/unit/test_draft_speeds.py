"""What tokens are worth to requests, and what steps take beside their costs."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_medusa.draft.overhead import Overhead
from vllm_medusa.draft.speeds import Speeds


def test_a_token_of_a_slow_request_is_worth_more() -> None:
    speeds = Speeds()
    np.testing.assert_array_equal(speeds.weights(["slow", "fast"]), [1, 1])
    for _ in range(200):
        speeds.record("slow", 1)
        speeds.record("fast", 4)
    slow, new, fast = speeds.weights(["slow", "new", "fast"])
    assert new == pytest.approx(1)
    # About the mean, 2.5, over each one's own tokens per step; less, by the first steps' guess.
    assert 1.9**2 < slow < 2.5**2
    assert (2.5 / 4) ** 2 < fast < 0.7**2
    # Compared with those of the step.
    assert speeds.weights(["slow"]) == pytest.approx([1])


def test_speeds_are_those_of_late() -> None:
    speeds = Speeds()
    for tokens in (4, 1):
        for _ in range(200):
            speeds.record("slower", tokens)
            speeds.record("other", 2)
    slower, other = speeds.weights(["slower", "other"])
    assert slower > 1.3**2 > 1 > other
    speeds.finish("slower")
    new, other = speeds.weights(["slower", "other"])
    assert new == pytest.approx(1)
    assert other == pytest.approx(1)


def test_overhead_is_the_mean_beside_the_expected_time() -> None:
    overhead = Overhead()
    assert overhead.plain_ms(3) == 0
    overhead.record(3, 10, 14, has_forks=False)
    assert overhead.plain_ms(3) == 4
    assert overhead.plain_ms(2) == 4  # of the same range
    assert overhead.plain_ms(4) == 0
    for _ in range(300):
        overhead.record(3, 10, 12, has_forks=False)
        overhead.record(3, 10, 14, has_forks=False)
        overhead.record(3, 10, 15, has_forks=True)
    assert overhead.plain_ms(3) == pytest.approx(3, abs=0.1)
    assert overhead.forking_ms(3) == pytest.approx(2, abs=0.5)


def test_delays_count_little() -> None:
    overhead = Overhead()
    for has_forks in (False, True):
        for _ in range(100):
            overhead.record(1, 10, 12, has_forks=has_forks)
    for has_forks in (False, True):
        overhead.record(1, 10, 5000, has_forks=has_forks)
    assert overhead.plain_ms(1) < 2.2
    assert overhead.forking_ms(1) < 0.2
    overhead.record(1, 10, 3, has_forks=False)
    assert 1.9 < overhead.plain_ms(1) < 2.2


def test_forks_that_were_slow_once_are_tried_again() -> None:
    overhead = Overhead()
    for _ in range(50):
        overhead.record(1, 10, 15, has_forks=True)
    assert overhead.forking_ms(1) == 5
    for _ in range(500):
        overhead.record(1, 10, 10, has_forks=False)
    assert overhead.forking_ms(1) < 0.5
