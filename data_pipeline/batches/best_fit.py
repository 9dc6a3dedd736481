"""Best-fit-decreasing bin packing of spans into rows of one length; a span is a run of tokens of one document.

Each span, from the longest to the shortest, goes into the fullest row that has room for it. For example, five spans of
lengths 3, 6, 4, 2 and 5 go into rows of 10:

    span    length   goes into                                  rows, as filled
    1       6        a new row                                  [6]
    4       5        a new row: 4 are left in the first         [6] [5]
    2       4        the first, which it fills                  [6 4] [5]
    0       3        the second                                 [6 4] [5 3]
    3       2        the second, which it fills                 [6 4] [5 3 2]

The method is that of "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.
"""

from __future__ import annotations

import itertools
from array import array
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.batches.reading import bounds, ranges, slices

_SORTED_AT_ONCE = 1 << 20
"""Spans of a part that is sorted by itself."""


_COPIED_AT_ONCE = 10_000
"""Runs of one length in such a part that are copied one by one; more of them are scattered together."""


class _Content(NamedTuple):
    """What each row of a group holds: some spans of one length, and what was put in before them.

    Row i has the `each` spans from the place placed + (i - first) * each on, in the order of all spans.
    """

    length: int
    """Length of these spans."""
    each: int
    """Number of these spans in a row."""
    first: int
    """The first row of the group."""
    placed: int
    """Number of spans that were placed before the first of these."""
    before: int
    """Place of the content that was put in before, or -1 where there was nothing."""


class _Group(NamedTuple):
    """Rows [first, stop), which hold spans of the same lengths."""

    first: int
    stop: int
    content: int
    """Place of the content of these rows, or -1 where they hold nothing."""


class BestFit:
    """The plan of a packing: which spans each row holds.

    Spans of one length are placed together: the fullest row with room r for length n takes r // n of them before
    another one is the fullest. Rows that hold the same lengths are kept as one group, so that work and memory, but for
    sorting, grow with the groups (thousands to some hundred thousand, by capacity) and not with the spans. The plan
    takes 4 bytes of memory per span and about a hundred per group, a few hundred while it is made.

    `len` is the number of rows.

    Args:
        lengths: Lengths of the spans, int [P], each in [1, capacity].
        capacity: Room of a row.
    """

    def __init__(self, lengths: np.ndarray, capacity: int):
        assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
        self._order, counts = _longest_first(lengths, capacity)
        self._rows, self._placed = 0, 0
        self._groups: list[_Group] = []  # those that take no more
        self._contents = array("q")  # the fields of one `_Content` after the other
        self._open: list[list[_Group]] = [[] for _ in range(capacity + 1)]  # by the room they have left
        self._is_open = np.zeros(capacity + 1, bool)
        for spare in np.flatnonzero(counts).tolist():
            self._place(capacity - spare, int(counts[spare]), capacity)
        self._groups += itertools.chain.from_iterable(self._open)
        by_row = sorted((group.first, group.content) for group in self._groups)
        self._firsts, self._content = (np.array(column, np.int64) for column in zip(*by_row or [(0, 0)]))
        self._table = np.array(self._contents, np.int64).reshape(-1, len(_Content._fields))
        del self._open, self._is_open, self._groups, self._contents

    def __len__(self) -> int:
        return self._rows

    def rows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what rows hold.

        Args:
            rows: Numbers of rows, int64 [N], each in [0, len).

        Returns:
            Indices [P] of the spans, row by row, those of a row from the longest to the shortest; lengths [P] of the
            spans; and how many each row has, [N].
        """
        assert rows.size == 0 or (rows.min() >= 0 and rows.max() < self._rows)
        found: list[tuple[np.ndarray, ...]] = []
        row = np.arange(len(rows))
        place = self._content[self._firsts.searchsorted(rows, side="right") - 1]
        while not found or row.size:  # of all rows at once, what was put in last, and so on
            length, each, first, placed, before = self._table[place].T
            found.append((row, placed + (rows[row] - first) * each, each, length))
            row, place = row[before >= 0], before[before >= 0]
        row, begin, each, length = (np.concatenate(parts) for parts in zip(*reversed(found)))
        by_row = np.argsort(row, kind="stable")
        row, begin, each, length = row[by_row], begin[by_row], each[by_row], length[by_row]
        places = np.repeat(2 * begin + each - 1, each) - ranges(begin, each)  # from the last to the first
        return self._order[places], length.repeat(each), np.bincount(row.repeat(each), minlength=len(rows))

    def _place(self, length: int, count: int, capacity: int) -> None:
        room = length
        while count and self._is_open[room := room + int(self._is_open[room:].argmax())]:  # the fullest that have room
            first, stop, content = self._open[room].pop()
            needed = -(-count // (room // length))
            if needed < stop - first:
                self._open[room].append(_Group(first + needed, stop, content))
            self._is_open[room] = bool(self._open[room])
            count -= self._fill(_Group(first, min(first + needed, stop), content), room, length, count)
        if count:
            first, self._rows = self._rows, self._rows - (-count // (capacity // length))
            self._fill(_Group(first, self._rows, -1), capacity, length, count)

    def _fill(self, group: _Group, room: int, length: int, count: int) -> int:
        """Put up to `count` spans into the rows of a group, each as full as it gets, and return how many."""
        first, stop, content = group
        each = room // length
        count = min(count, each * (stop - first))
        middle, rest = first + count // each, count % each
        for begin, end, pieces in ((first, middle, each), (middle, middle + 1, rest)):
            if begin < end and pieces:
                left = room - pieces * length
                filled = _Group(begin, end, len(self._contents) // len(_Content._fields))
                self._contents.extend((length, pieces, begin, self._placed, content))
                self._placed += (end - begin) * pieces
                if left:
                    self._open[left].append(filled)
                    self._is_open[left] = True
                else:
                    self._groups.append(filled)
        return count


def _longest_first(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort all spans from the longest to the shortest, those of one length in their order.

    Spans are sorted by counting, a part at a time: memory that was never used costs more time than the arithmetic.

    Returns:
        The indices [P] of all spans in that order, and how many there are of length capacity - n, for each n in
        [0, capacity).
    """
    # The room that is left and the place within a part in one number: numpy sorts numbers faster than it orders them.
    key_type: Any = np.uint32 if capacity <= 2**32 // _SORTED_AT_ONCE else np.uint64
    parts = [lengths[start : start + _SORTED_AT_ONCE] for start in range(0, len(lengths), _SORTED_AT_ONCE)]
    counts = [np.bincount(capacity - part, minlength=capacity) for part in parts]
    totals: np.ndarray = sum(counts, np.zeros(capacity, np.int64))
    order: np.ndarray = np.empty(len(lengths), np.uint32 if len(lengths) < 2**32 else np.int64)
    free = bounds(totals)[:-1]
    for number, (part, count) in enumerate(zip(parts, counts)):
        keys = (capacity - part).astype(key_type) * key_type(_SORTED_AT_ONCE) + np.arange(len(part), dtype=key_type)
        keys.sort()
        keys %= key_type(_SORTED_AT_ONCE)
        places = keys.astype(order.dtype, copy=False) + order.dtype.type(number * _SORTED_AT_ONCE)
        (spares,) = count.nonzero()
        if len(spares) > _COPIED_AT_ONCE:
            order[ranges(free[spares], count[spares])] = places
        else:
            for start, found in zip(free[spares].tolist(), slices(bounds(count[spares]))):
                order[start : start + found.stop - found.start] = places[found]
        free += count
    return order, totals
