"""What tokens are worth to requests, and what steps take beside their costs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def corrected(overhead: Overhead, num_requests: int, *ms: float) -> list[float]:
    return overhead.corrected(num_requests, np.array(ms)).tolist()


def test_times_are_corrected_by_a_factor_while_all_steps_are_alike() -> None:
    overhead = Overhead()
    assert corrected(overhead, 3, 10, 20) == [10, 20]
    overhead.record(3, 10, 14, has_forks=False)
    assert corrected(overhead, 3, 10, 20) == pytest.approx([14, 28])
    assert corrected(overhead, 2, 10) == pytest.approx([14])  # of the same range
    assert corrected(overhead, 4, 10) == [10]
    for _ in range(300):
        overhead.record(3, 10, 12, has_forks=False)
        overhead.record(3, 10, 14, has_forks=False)
        overhead.record(3, 10, 15, has_forks=True)
    assert corrected(overhead, 3, 10, 20) == pytest.approx([13, 26], rel=0.01)
    assert overhead.forking_ms(3) == pytest.approx(2, abs=0.5)


@given(st.floats(0, 8), st.floats(0.2, 1.0), st.lists(st.floats(8, 16), min_size=2, max_size=9))
def test_different_steps_tell_the_constant_from_the_factor(
    constant: float, factor: float, expected: list[float]
) -> None:
    """The line found is between the true one and that of a factor alone."""
    overhead = Overhead()
    for _ in range(100):
        for ms in expected:
            overhead.record(1, ms, constant + factor * ms, has_forks=False)
    low, high = corrected(overhead, 1, 8, 16)
    assert factor * 8 < high - low + 1e-6 < 2e-6 + max(high / 2, factor * 8)
    spread = np.std(expected) / np.mean(expected)
    if spread > 0.3:
        assert (low, high) == pytest.approx(
            (constant + factor * 8, constant + factor * 16), rel=0.1
        )


def test_delays_count_little() -> None:
    overhead = Overhead()
    for has_forks in (False, True):
        for _ in range(100):
            overhead.record(1, 10, 12, has_forks=has_forks)
    for has_forks in (False, True):
        overhead.record(1, 10, 5000, has_forks=has_forks)
    assert 12 < corrected(overhead, 1, 10)[0] < 12.5
    assert overhead.forking_ms(1) < 0.5


def test_a_slow_first_step_with_forks_does_not_stop_them() -> None:
    overhead = Overhead()
    overhead.record(1, 10, 10, has_forks=False)
    overhead.record(1, 10, 20, has_forks=True)
    assert overhead.forking_ms(1) < 1.5
    for _ in range(8):
        overhead.record(1, 10, 11, has_forks=True)
    assert overhead.forking_ms(1) < 1.5


def test_forks_that_were_slow_once_are_tried_again() -> None:
    overhead = Overhead()
    for _ in range(50):
        overhead.record(1, 10, 15, has_forks=True)
    assert 4 < overhead.forking_ms(1) <= 5
    for _ in range(500):
        overhead.record(1, 10, 10, has_forks=False)
    assert overhead.forking_ms(1) < 0.5
