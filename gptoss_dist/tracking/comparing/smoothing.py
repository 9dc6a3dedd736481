"""A loss at a place on an axis: smoothed, never extrapolated, and with the noise that is in it.

The losses within a window around the place are fitted with a straight line by least squares; its value there is the
smoothed loss. A line, unlike a mean, is not biased by a curve that falls, and not at the end of a run either, where the
window has one side only.

    window at 100 with half-width 10: losses at 90, 92, ..., 110 -> line -> its value at 100

The noise of that value is its standard error, from what the losses differ from the line. Losses near each other may
be alike, so the error is widened by the factor by which the variance of a mean grows: the larger of what the
correlation of neighbours says, (1 + r) / (1 - r), and what the means of blocks say, for windows of 100 losses or more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

HALF_WIDTH = 0.1
"""Of the window, as a share of the place on the axis."""
FEWEST = 16
"""Losses in a window; it grows until every run has so many."""
_FEWEST_AT_ALL = 4
_BLOCKS = 12
_FOR_BLOCKS = 100
_FOR_CORRELATION, _MOST_FOR_CORRELATION = 64, 2048
"""Losses, at least and at most, that tell how neighbours are correlated."""
_LARGEST_CORRELATION = 0.95
_SHARED = 0.8
"""Of the losses of two runs that are compared batch by batch, those that lie at the same places, at least."""


@dataclass(frozen=True)
class Smoothed:
    """A loss at a place."""

    value: float
    """NaN if the run did not get there, or has fewer than 4 losses around it."""
    error: float
    """Standard error of the value; it does not contain what another seed would change."""
    freedom: float
    """Degrees of freedom of the error."""
    count: int
    """Losses in the window."""

    @property
    def is_known(self) -> bool:
        """Whether there is a value."""
        return math.isfinite(self.value)


UNKNOWN = Smoothed(math.nan, math.nan, math.nan, 0)


def window(curves: list[np.ndarray], place: float) -> float:
    """Return the half-width of the window around a place, the same for all runs.

    Args:
        curves: For each run where its losses lie on the axis, float64 [M], in order.
        place: On the axis, more than 0.
    """
    half = HALF_WIDTH * place
    for x in curves:
        if len(x) >= FEWEST and x[-1] >= place:
            low, high = np.searchsorted(x, [place - half, place + half], side="left")
            if high - low < FEWEST:
                half = max(half, _reach(x, place))
    return half


def _reach(x: np.ndarray, place: float) -> float:
    """Return the distance from `place` to the value of `x` that is the `FEWEST`-th nearest."""
    middle = int(np.searchsorted(x, place))
    near = np.abs(x[max(0, middle - FEWEST) : middle + FEWEST] - place)
    return float(np.sort(near)[min(FEWEST, len(near)) - 1]) * (1 + 1e-9)


def smooth(x: np.ndarray, y: np.ndarray, place: float, half: float) -> Smoothed:
    """Return the smoothed loss at a place.

    Args:
        x: float64 [M], where the losses lie, in order.
        y: float64 [M], the losses.
        place: Where it is wanted; a run that ended before, or began later, has none there.
        half: Half-width of the window.
    """
    if not len(x) or not _covers(x, place):
        return UNKNOWN
    low, high = _indices(x, place, half)
    count = high - low
    if count < _FEWEST_AT_ALL:
        return UNKNOWN
    neighbours = _correlation(y, low, high)
    x, y = x[low:high] - place, y[low:high]
    centre = float(x.mean())
    spread = float(((x - centre) ** 2).sum())
    if spread == 0:
        return UNKNOWN
    slope = float(((x - centre) * y).sum()) / spread
    value = float(y.mean()) - slope * centre
    residuals = y - (value + slope * x)
    inflation = _inflation(residuals, neighbours)
    variance = float((residuals**2).sum()) / (count - 2 * inflation)  # of noise that the line has not followed
    error = math.sqrt(variance * inflation * (1 / count + centre**2 / spread))
    return Smoothed(value, error, max(2.0, count / inflation - 2), count)


def value_at(x: np.ndarray, y: np.ndarray, place: float, half: float) -> float:
    """Return the value of `smooth` alone, NaN where there is none."""
    if not len(x) or not _covers(x, place):
        return math.nan
    low, high = _indices(x, place, half)
    x, y = x[low:high] - place, y[low:high]
    spread = float(((x - x.mean()) ** 2).sum()) if len(x) >= _FEWEST_AT_ALL else 0.0
    return float(y.mean() - x.mean() * ((x - x.mean()) * y).sum() / spread) if spread else math.nan


def paired_difference(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], place: float, half: float
) -> Smoothed | None:
    """Return first minus second where both have losses at the same places in the window; None elsewhere.

    Runs that read the same batches are high and low together, and the noise of their difference is then less than that
    of either. A place at which either has no finite loss is left out.
    """
    sides = [_indices(x, place, half) for x, _ in (first, second)]
    before = min(_FOR_CORRELATION, *(low for low, _ in sides))
    (x, y), (other_x, other_y) = (
        (x[low - before : high], y[low - before : high]) for (low, high), (x, y) in zip(sides, (first, second))
    )
    if not len(x) or not len(other_x):
        return None
    nearest = np.searchsorted(other_x, x * (1 - 1e-9)).clip(max=len(other_x) - 1)
    both = np.isclose(x, other_x[nearest], rtol=1e-9, atol=0)
    if np.count_nonzero(both) < _SHARED * max(len(x), len(other_x)):
        return None
    x, y, other_y = x[both], y[both], other_y[nearest[both]]
    difference = smooth(x, y - other_y, place, half)
    return difference if difference.is_known else None


def _indices(x: np.ndarray, place: float, half: float) -> tuple[int, int]:
    return int(np.searchsorted(x, place - half, "left")), int(np.searchsorted(x, place + half, "right"))


def _covers(x: np.ndarray, place: float) -> bool:
    slack = 1e-9 * abs(place)  # a place that was computed from an end of the curve
    return bool(x[0] - slack <= place <= x[-1] + slack)


def _correlation(y: np.ndarray, low: int, high: int) -> float:
    """Return how losses next to each other are correlated, in a window that is widened to what that takes."""
    if high - low > _MOST_FOR_CORRELATION:
        low = (low + high - _MOST_FOR_CORRELATION) // 2
        high = low + _MOST_FOR_CORRELATION
    missing = max(0, _FOR_CORRELATION - (high - low))
    low = max(0, low - missing // 2 - max(0, high + missing - missing // 2 - len(y)))
    high = min(len(y), low + max(high - low, _FOR_CORRELATION))
    z, part = np.log(np.arange(low + 1, high + 1)), y[low:high]  # losses bend least over the logarithm of steps
    z = (z - z.mean()) / float(np.ptp(z))
    powers = np.stack([np.ones_like(z), z, z**2, z**3], axis=1)
    residuals = part - powers @ np.linalg.lstsq(powers, part, rcond=None)[0]
    total = float((residuals**2).sum())
    if total == 0:
        return 0.0
    found = float((residuals[1:] * residuals[:-1]).sum()) / total
    # What is left of a fit with four parameters is less correlated than the noise is, by about so much.
    return min(max(found + (4 + 4 * max(found, 0)) / len(z), 0.0), _LARGEST_CORRELATION)


def _inflation(residuals: np.ndarray, neighbours: float) -> float:
    """Return the factor by which correlation widens the variance of a mean; 1 at least."""
    count = len(residuals)
    total = float((residuals**2).sum())
    if total == 0:
        return 1.0
    factor = (1 + neighbours) / (1 - neighbours)
    if count >= _FOR_BLOCKS:
        length = count // _BLOCKS
        means = residuals[: length * _BLOCKS].reshape(_BLOCKS, length).mean(axis=1)
        factor = max(factor, length * float((means**2).sum()) / (_BLOCKS - 2) / (total / (count - 2)))
    return min(factor, count / 4)


def smooth_curve(x: np.ndarray, y: np.ndarray, places: np.ndarray, half: np.ndarray) -> np.ndarray:
    """Return the smoothed losses at many places, for a picture, in time that does not depend on the windows.

    Args:
        x: float64 [M], in order.
        y: float64 [M].
        places: float64 [B], within `x`.
        half: float64 [B], half-widths of the windows.

    Returns:
        float64 [B]; where a window has fewer than 4 losses, their mean.
    """
    origin, scale = x[len(x) // 2], max(float(x[-1] - x[0]), 1e-300)
    z = (x - origin) / scale
    sums = [np.concatenate([[0.0], np.cumsum(values)]) for values in (z, z * z, y, z * y)]
    low = np.searchsorted(x, places - half, side="left")
    high = np.maximum(np.searchsorted(x, places + half, side="right"), low + 1)
    high = np.minimum(high, len(x))
    low = np.minimum(low, high - 1)
    count = high - low
    mean_x, mean_xx, mean_y, mean_xy = ((total[high] - total[low]) / count for total in sums)
    spread = mean_xx - mean_x**2
    enough = (count >= _FEWEST_AT_ALL) & (spread > 1e-14)
    slope = np.where(enough, (mean_xy - mean_x * mean_y) / np.where(enough, spread, 1.0), 0.0)
    return mean_y + slope * ((places - origin) / scale - mean_x)
