"""A curve as text: dots of braille characters, eight in each, or stars where a terminal cannot show them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

EARLY = 20
"""A loss falls from a height that nobody needs to see: the first of so many parts of a curve may be cut off."""
_USUAL = 0.98
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

    Each column of dots shows the range of the values that fall into it, joined with the column before. What `limits`
    leaves out is drawn at the edge.

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
    low, high = _with_margin(*limits(values))
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


def limits(values: np.ndarray, *, is_sparse: bool = False) -> tuple[float, float]:
    """Return the range of a falling curve that is worth the room: without the height it falls from, and lone spikes.

    A fiftieth of the values may be left out if they lie far above all others: by half of the range of these.

    Args:
        values: float64 [N], finite, N at least 1.
        is_sparse: They were measured now and then, and the first of them was at that height.
    """
    head = max(len(values) // EARLY, 1 if is_sparse and len(values) > 1 else 0)
    later, low = values[head:], float(values.min())
    usual = float(np.quantile(later, _USUAL, method="lower"))
    return low, min(float(later.max()), usual + 0.5 * (usual - low))


def _with_margin(low: float, high: float) -> tuple[float, float]:
    """Return a range that is never empty."""
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
