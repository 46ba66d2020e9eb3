import itertools
import math

import pytest

from isthmus.objectives import schedules

SHAPES = [schedules.linear, schedules.cosine, schedules.sigmoid]


@pytest.mark.parametrize("shape", [*SHAPES, schedules.cyclical])
def test_the_ends_are_exact(shape):
    assert shape(0, 7, start=0.1, end=0.7) == 0.1
    assert shape(7, 7, start=0.1, end=0.7) == 0.7
    assert shape(10**9, 7, start=0.1, end=0.7) == 0.7


@pytest.mark.parametrize("shape", SHAPES)
def test_ramps_rise_steadily_and_are_symmetric_about_the_middle(shape):
    values = [shape(step, 40) for step in range(41)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert values[20] == pytest.approx(0.5, abs=1e-15)
    assert all(a + b == pytest.approx(1.0) for a, b in zip(values, reversed(values), strict=True))


def test_exact_points():
    assert schedules.linear(3, 4, start=2.0, end=4.0) == 3.5
    assert schedules.cosine(1, 3) == pytest.approx(0.25)
    assert schedules.cosine(1, 4) == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_sigmoid_is_the_stretched_logistic():
    def logistic(t):
        return 1 / (1 + math.exp(-8 * (t - 0.5)))

    low, high = logistic(0), logistic(1)
    for step in range(11):
        expected = (logistic(step / 10) - low) / (high - low)
        assert schedules.sigmoid(step, 10, slope=8) == pytest.approx(expected, abs=1e-15)
    # A flat one is the straight line.
    assert schedules.sigmoid(3, 10, slope=1e-4) == pytest.approx(0.3, abs=1e-8)


def test_cycles_restart_exactly_and_hold_after_their_ramp():
    # 3 cycles of 10/3 steps: their borders are no integers, and the arithmetic must not care.
    for cycle in range(3):
        assert schedules.cyclical(10 * cycle, 30, cycles=3, start=0.2) == 0.2
        assert schedules.cyclical(10 * cycle + 5, 30, cycles=3) == 1.0
        assert schedules.cyclical(10 * cycle + 9, 30, cycles=3) == 1.0
        assert schedules.cyclical(10 * cycle + 2, 30, cycles=3) == pytest.approx(0.4)
    assert schedules.cyclical(5, 10, cycles=3, ramp=1.0) == pytest.approx(0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_cycles_take_the_shape_of_their_ramp(shape):
    assert schedules.cyclical(21, 100, cycles=5, ramp=0.25, shape=shape) == pytest.approx(shape(1, 5))


def test_one_cycle_with_a_full_ramp_is_the_ramp():
    assert [schedules.cyclical(s, 8, cycles=1, ramp=1.0) for s in range(9)] == [s / 8 for s in range(9)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.linear(-1, 10), "step is -1"),
        (lambda: schedules.cosine(1, 0), "steps is 0"),
        (lambda: schedules.sigmoid(1, 10, slope=0.0), "slope is 0.0"),
        (lambda: schedules.cyclical(1, 10, cycles=0), "cycles is 0"),
        (lambda: schedules.cyclical(1, 10, ramp=1.5), "ramp is 1.5"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
