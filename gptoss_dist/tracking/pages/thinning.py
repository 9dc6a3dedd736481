"""Curves of any length as so many points as a screen can show, without losing a peak."""

from __future__ import annotations

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
    if not len(values):
        nothing = np.empty(0)
        return Thinned(np.empty(0, np.int64), nothing, nothing, nothing)
    first = np.arange(0, len(values), -(-len(values) // most))
    last = np.append(first[1:], len(values)) - 1
    low, high = np.minimum.reduceat(values, first), np.maximum.reduceat(values, first)
    return Thinned(last, low, high, np.add.reduceat(values, first) / (last - first + 1))


def rounded(values: np.ndarray, digits: int = 6) -> np.ndarray:
    """Return float64 values with so many significant digits, which take less room as text; NaN stays."""
    values = np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.where(values == 0, 0, np.floor(np.log10(np.abs(values))))
        scale = 10.0 ** (digits - 1 - np.nan_to_num(exponent, posinf=0, neginf=0))
        return np.round(values * scale) / scale
