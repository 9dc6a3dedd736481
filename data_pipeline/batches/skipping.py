"""Positions of a data order that are never read: a part of the order, not a state.

Ranges are stated in positions, as all else about the order is, so that nothing before or behind them moves: a position
keeps its sample, a mixture's sources keep their counts, and a stage of a curriculum its beginning. The loader passes
over the ranges; `samples_consumed` is the place in the order, and counts positions that were passed over as well.

For example, positions 2 to 4 are skipped, and steps have 2 samples:

    position        0  1  2  3  4  5  6  7  8
    read as         0  1  -  -  -  2  3  4  5
    step            1  1           2  2  3  3
    samples_consumed after each step: 2, 7, 9

On one rank or many, a step takes the next positions that are read. So their sequence is the same whatever the sizes of
the steps, and a run that goes on from 2, 5 or anywhere between reads position 5 next.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from data_pipeline.batches.reading import bounds


class SkippedPositions:
    """Ranges of positions that are never read.

    Args:
        ranges: The first position of each range and the one after its last, in any order. They may overlap.

    Attributes:
        ranges: The same positions as disjoint ranges, ascending, which do not touch.

    Raises:
        ValueError: A range is empty, or begins before position 0.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()):
        self.ranges: list[tuple[int, int]] = []
        for first, end in sorted(ranges):
            if not 0 <= first < end:
                raise ValueError(f"positions {first} to {end} are no range that could be skipped")
            if self.ranges and first <= self.ranges[-1][1]:
                first, previous = self.ranges.pop()
                end = max(end, previous)
            self.ranges.append((first, end))
        self._firsts = np.array([first for first, _ in self.ranges], np.int64)
        self._lengths_before = bounds([end - first for first, end in self.ranges])
        # Range i lies between the reads of numbers `_reads_before[i] - 1` and `_reads_before[i]`.
        self._reads_before = self._firsts - self._lengths_before[:-1]

    @property
    def total(self) -> int:
        """The number of positions of all ranges together."""
        return int(self._lengths_before[-1])

    def reads_before(self, position: int) -> int:
        """Return how many of the positions before `position` are read."""
        number = int(self._firsts.searchsorted(position))  # ranges that begin before it
        if number == 0:
            return position
        first, end = self.ranges[number - 1]
        return position - int(self._lengths_before[number - 1]) - (min(end, position) - first)

    def positions(self, reads: np.ndarray) -> np.ndarray:
        """Return the positions that are read as number 0, 1 and so on of all.

        Args:
            reads: Numbers of reads, from 0, int64 of any shape.

        Returns:
            Positions, int64 of that shape.
        """
        if not self.ranges:
            return reads
        return reads + self._lengths_before[self._reads_before.searchsorted(reads, side="right")]
