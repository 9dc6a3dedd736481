"""Smoothed losses: what they are, that their errors are honest, and that nothing is extrapolated."""

import numpy as np
import pytest

from gptoss_dist.tracking.comparing.smoothing import (
    FEWEST,
    HALF_WIDTH,
    paired_difference,
    smooth,
    smooth_curve,
    window,
)
from gptoss_dist.tracking.comparing.verdicts import t_quantile
from tests.support.recorded_runs import law, noise


def tokens(steps):
    return 4096.0 * np.arange(1, steps + 1)


@pytest.mark.parametrize(
    ("steps", "correlation", "least"), [(400, 0.0, 0.93), (60, 0.0, 0.93), (400, 0.5, 0.9), (4000, 0.9, 0.9)]
)
def test_errors_cover_the_truth_as_often_as_they_say(steps, correlation, least):
    """At the end of a run, where the window has one side only and a plain mean would be too high."""
    x = tokens(steps)
    end = float(x[-1])
    half = window([x], end)
    found = [smooth(x, law(x) + noise(steps, 0.02, seed, correlation), end, half) for seed in range(300)]
    covered = [abs(one.value - law(end)) <= t_quantile(0.975, one.freedom) * one.error for one in found]
    assert least < np.mean(covered) < 0.995
    assert abs(np.mean([one.value for one in found]) - law(end)) < 0.004


def test_the_window_is_the_same_for_all_and_grows_until_each_run_has_enough():
    dense, sparse = tokens(1000), 20 * tokens(50)
    place = float(dense[-1])
    half = window([dense, sparse], place)
    assert half > HALF_WIDTH * place
    assert np.count_nonzero(np.abs(sparse - place) <= half) == FEWEST
    assert window([dense], place) == HALF_WIDTH * place


def test_nothing_is_extrapolated():
    x = tokens(100)
    y = law(x)
    assert smooth(x, y, float(x[-1]), 1e5).is_known
    assert not smooth(x, y, float(x[-1]) * 1.001, 1e5).is_known
    assert not smooth(x, y, float(x[0]) * 0.99, 1e5).is_known
    assert not smooth(x[:3], y[:3], float(x[1]), 1e5).is_known
    assert not smooth(np.empty(0), np.empty(0), 1.0, 1.0).is_known


def test_the_curve_of_a_picture_is_the_value_of_the_tables():
    x = tokens(5000)
    y = law(x) + noise(5000, 0.05, 1)
    places = x[[40, 700, 2500, 4999]]
    half = HALF_WIDTH * places
    expected = [smooth(x, y, float(place), float(width)).value for place, width in zip(places, half)]
    np.testing.assert_allclose(smooth_curve(x, y, places, half), expected, rtol=1e-9)


def test_runs_that_read_the_same_batches_are_compared_batch_by_batch():
    x, shared = tokens(400), noise(400, 0.2, 0)
    first = x, law(x) + shared + noise(400, 0.001, 1)
    second = x, law(x) + 0.01 + shared + noise(400, 0.001, 2)
    place = float(x[-1])
    difference = paired_difference(second, first, place, HALF_WIDTH * place)
    assert abs(difference.value - 0.01) < 4 * difference.error < 0.004
    assert smooth(*first, place, HALF_WIDTH * place).error > 0.02
    gaps = np.delete(x, [100, 380]), np.delete(first[1], [100, 380])  # steps whose loss was NaN
    without = paired_difference(second, gaps, place, HALF_WIDTH * place)
    assert abs(without.value - 0.01) < 4 * without.error < 0.004
    assert paired_difference((2 * x, second[1]), first, place, HALF_WIDTH * place) is None
    assert paired_difference((1.5 * x, second[1]), first, place, HALF_WIDTH * place) is None
