"""Curves of any length as so many points as a screen can show, without losing a peak; and their averages.

Shapes: N values, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_POINTS = 1500
"""About the pixels across a figure."""


@dataclass(frozen=True)
class Thinned:
    """A curve in bins of equally many values, in order."""

    last: np.ndarray
    """int64 [B]: the index of the last value of each bin."""
    low: np.ndarray
    """float64 [B]: the least value of the bin."""
    high: np.ndarray
    """float64 [B]: the greatest."""
    mean: np.ndarray
    """float64 [B]."""

    @property
    def is_whole(self) -> bool:
        """Whether each bin is one value."""
        return len(self.last) == 0 or len(self.last) == self.last[-1] + 1


def thin(values: np.ndarray, most: int = MOST_POINTS) -> Thinned:
    """Cut a curve into at most `most` bins.

    Args:
        values: float64 [N], finite.
        most: Bins, at least 1.
    """
    first, last = bins(len(values), most)
    if not len(values):
        return Thinned(last, np.empty(0), np.empty(0), np.empty(0))
    low, high = np.minimum.reduceat(values, first), np.maximum.reduceat(values, first)
    return Thinned(last, low, high, means(values, first))


def bins(length: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last index of each of at most `most` bins of equally many values, both int64 [B].

    Args:
        length: N.
        most: Bins, at least 1.
    """
    first = np.arange(0, length, max(1, -(-length // most)))
    return first, np.append(first[1:], length)[: len(first)] - 1


def means(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return the mean of each bin, float64 [..., B].

    Args:
        values: float64 [..., N], N at least 1.
        first: Of `bins`, [B].
    """
    counts = np.diff(np.append(first, values.shape[-1]))
    return np.add.reduceat(values, first, axis=-1) / counts


def averaged(values: np.ndarray, parts: int) -> np.ndarray:
    """Return the exponential moving average over about one of `parts` parts of a curve, from its first value on.

    Args:
        values: float64 [N], finite.
        parts: Such as 100 for a hundredth of the curve.
    """
    alpha = 2 / (max(1.0, len(values) / parts) + 1)
    result = np.empty_like(values)
    mean = values[0] if len(values) else 0.0
    for i, value in enumerate(values.tolist()):
        mean += alpha * (value - mean)
        result[i] = mean
    return result


def warmed_up(steps: np.ndarray, resumes: Sequence[int]) -> np.ndarray:
    """Return which steps are not the first of a process, which compiles and warms up; all if there are few others.

    Args:
        steps: int64 [N], in order.
        resumes: The steps that training went on from.
    """
    keep = np.ones(len(steps), dtype=bool)
    first = np.searchsorted(steps, [-1, *resumes], side="right")
    if len(steps) > 2 * len(first):
        keep[first[first < len(steps)]] = False
    return keep


def rounded(values: np.ndarray, digits: int = 6) -> np.ndarray:
    """Return float64 values with so many significant digits, which take less room as text; NaN stays."""
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.where(values == 0, 0, np.floor(np.log10(np.abs(values))))
        scale = 10.0 ** (digits - 1 - np.nan_to_num(exponent, posinf=0, neginf=0))
        return np.round(values * scale) / scale
