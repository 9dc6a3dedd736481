"""A curve as text: dots of braille characters, eight in each, or stars where a terminal cannot show them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_BRAILLE = 0x2800
# Bits of a braille character's dots, by row (0 to 3, from above) and column (0, 1).
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def draw(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    width: int,
    height: int,
    *,
    only_ascii: bool = False,
) -> list[str]:
    """Draw a curve with its scale.

    Each column of dots shows the range of the values that fall into it, joined with the column before. Values of the
    curve's beginning that are far above the rest are cut off, as a loss falls from a height that nobody needs to see.

    Args:
        x: Positions, growing.
        y: Values; those that are not finite are left out.
        width: Characters of a line, the scale included.
        height: Lines.
        only_ascii: Draw with stars.

    Returns:
        `height` lines of at most `width` characters; without two finite values one line that says so.
    """
    at, values = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    known = np.isfinite(at) & np.isfinite(values)
    at, values = at[known], values[known]
    if len(at) < 2 or at[-1] <= at[0]:
        return ["(not enough values yet)"]
    low, high = _limits(values)
    labels = [f"{value:.4g}" for value in (high, (low + high) / 2, low)]
    margin = max(map(len, labels)) + 1
    columns = max(1, width - margin)
    dots = _dots(at, values, (low, high), 2 * columns, 4 * height)
    lines = []
    for row in range(height):
        label = {0: labels[0], height // 2: labels[1], height - 1: labels[2]}.get(row, "")
        cells = dots[4 * row : 4 * row + 4].reshape(4, columns, 2).transpose(1, 0, 2)
        lines.append(f"{label:>{margin - 1}} " + "".join(_character(cell, only_ascii) for cell in cells))
    return lines


def _limits(y: np.ndarray) -> tuple[float, float]:
    """Return the range that is shown, never empty."""
    later = y[len(y) // 10 :]
    low, high = float(y.min()), float(later.max())
    margin = 0.05 * (high - low) or 0.01 * max(abs(high), 1e-9)
    return low - margin, high + margin


def _dots(x: np.ndarray, y: np.ndarray, limits: tuple[float, float], width: int, height: int) -> np.ndarray:
    """Return which dots are set, as booleans [height, width], the first row at the top."""
    low, high = limits
    column = np.minimum(((x - x[0]) / (x[-1] - x[0]) * width).astype(int), width - 1)
    row = np.round((high - np.clip(y, low, high)) / (high - low) * (height - 1)).astype(int)
    dots = np.zeros((height, width), dtype=bool)
    first = np.flatnonzero(np.diff(column, prepend=-1))
    tops, bottoms = np.minimum.reduceat(row, first), np.maximum.reduceat(row, first)
    last = np.append(first[1:], len(row)) - 1
    previous: tuple[int, int] | None = None
    for at, top, bottom, end in zip(column[first].tolist(), tops.tolist(), bottoms.tolist(), row[last].tolist()):
        if previous is not None:
            _join(dots, previous, (at, min(max(previous[1], top), bottom)))
        dots[top : bottom + 1, at] = True
        previous = at, end
    return dots


def _join(dots: np.ndarray, start: tuple[int, int], end: tuple[int, int]) -> None:
    """Set the dots of a line between two (column, row) where columns lie between them."""
    for at in range(start[0] + 1, end[0]):
        share = (at - start[0]) / (end[0] - start[0])
        dots[math.floor(start[1] + share * (end[1] - start[1]) + 0.5), at] = True


def _character(cell: np.ndarray, only_ascii: bool) -> str:
    if only_ascii:
        return "*" if cell.any() else " "
    bits = sum(_BITS[row][column] for row in range(4) for column in range(2) if cell[row, column])
    return chr(_BRAILLE + bits) if bits else " "
