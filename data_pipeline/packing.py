"""Samples that keep documents whole: rows filled by best fit, or one document each without any padding.

A document of L tokens, its end-of-text token last, has L - 1 inputs, each with the token after it as its label; nothing
is predicted across documents, and attention stays within `document_ids`. Positions need no reset: rotary embeddings
make attention depend on distances only, so a document's outputs are those that it has alone, up to rounding.

Shapes: N samples, T = seq_len, P pieces (documents, or parts of those longer than T).
"""

from __future__ import annotations

import itertools
from array import array
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.dataset import TokenDataset, TokenSplit
from data_pipeline.samples import Pieces, bounds, ranges, slices

_SORTED_AT_ONCE = 1 << 20
"""Pieces of a part that is sorted by itself."""
_COPIED_AT_ONCE = 10_000
"""Runs of one length in such a part that are copied one by one; more of them are scattered together."""


class _Content(NamedTuple):
    """What each row of a group holds: `each` pieces of `length`, and what was put in before them, the content at the
    place `before`, or nothing: -1.

    Row i has those at the places placed + (i - first) * each and on, in the order of all pieces.
    """

    length: int
    each: int
    first: int
    placed: int
    before: int


class _Group(NamedTuple):
    """Rows [first, stop), which hold pieces of the same lengths: the content at the place `content`, or nothing: -1."""

    first: int
    stop: int
    content: int


class BestFit:
    """Best-fit-decreasing bin packing: each piece, from the longest to the shortest, goes into the fullest row that has
    room for it ("Fewer Truncations Improve Language Modeling", arXiv:2404.10830).

    Pieces of one length are placed together: the fullest row with room r for length n takes r // n of them before
    another one is the fullest. Rows that hold the same lengths are kept as one group, so that work and memory, but for
    sorting, grow with the groups (thousands to some hundred thousand, by capacity) and not with the pieces. Memory: 4
    bytes per piece and about a hundred per group, a few hundred while the plan is made.

    lengths: int [P], each in [1, capacity]. `len` is the number of rows; `rows` says what they hold.
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
        """What rows hold, each in [0, len), int64 [N]: indices [P] of the pieces, row by row, those of a row from the
        longest to the shortest; lengths [P] of the pieces; and how many each row has, [N].
        """
        assert rows.size == 0 or (rows.min() >= 0 and rows.max() < self._rows)
        found, row = [], np.arange(len(rows))
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
        """Put up to `count` pieces into the rows of a group, each as full as it gets; returns how many."""
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


class BestFitDataset(TokenSplit):
    """Sample i is a row of T inputs that holds whole documents, chosen so that few are cut and little is padding.

    Only documents with more than T inputs are cut: into pieces of T, which are the first rows, and a rest. Each token
    but a document's first is predicted exactly once per epoch. The plan is the same wherever it is made. Memory: 12
    bytes per document, 8 per row that is a piece of T, and about a hundred per group of alike rows; while it is made
    about 30, 16 and a few hundred. Attributes and errors as in `TokenSplit`, and:

        padding_share: of the inputs of an epoch. cut_share: of the documents, how many are cut.
    """

    packing = "best_fit"
    plan_version = 2

    def _count_samples(self) -> int:
        T = self.seq_len
        self._starts, lengths = _documents(self._shards)
        long = np.flatnonzero(lengths > T)
        self.cut_share = len(long) / max(len(lengths), 1)
        parts = (lengths[long] - 1) // T  # before the rest
        before = np.cumsum(parts) - parts  # in place: these may be more than all documents
        self._full_rows = np.repeat(self._starts[long] - before * T, parts)
        self._full_rows += np.arange(0, len(self._full_rows) * T, T)
        self._starts[long] += parts.astype(np.int64) * T
        lengths[long] -= parts * T
        self._plan = BestFit(lengths, T)
        samples = len(self._full_rows) + len(self._plan)
        self.inputs_total = len(self._full_rows) * T + int(lengths.sum())
        self.padding_share = 1 - self.inputs_total / max(samples * T, 1)
        return samples

    def pieces(self, indices: np.ndarray) -> Pieces:
        T, full = self.seq_len, len(self._full_rows)
        (cut,), (packed,) = (indices < full).nonzero(), (indices >= full).nonzero()
        documents, lengths, counts = self._plan.rows(indices[packed] - full)
        padding = T - np.diff(bounds(lengths)[bounds(counts)])
        counts_N = np.ones(len(indices), np.int64)
        counts_N[packed] = counts + (padding > 0)
        first = bounds(counts_N)
        starts_P, lengths_P = np.full(first[-1], -1), np.empty(first[-1], np.int64)
        starts_P[first[cut]], lengths_P[first[cut]] = self._full_rows[indices[cut]], T
        places = ranges(first[packed], counts)
        starts_P[places], lengths_P[places] = self._starts[documents], lengths
        lengths_P[(first[packed] + counts)[padding > 0]] = padding[padding > 0]
        return Pieces(starts_P, lengths_P, counts_N)


class DocumentDataset(TokenSplit):
    """Padding-free variable length, for fine-tuning: sample i is document i, cut after T inputs.

    A micro-batch is one row [1, N] of its documents one after the other, numbered by `document_ids`: no padding,
    however different their lengths. Documents of one token have nothing to predict and are left out. Takes 12 bytes of
    memory per document. Attributes and errors as in `TokenSplit`, and `cut_share`: of the documents, how many are cut.
    """

    packing = "varlen"

    def _count_samples(self) -> int:
        self._starts, lengths = _documents(self._shards)
        self._lengths = np.minimum(lengths, self.seq_len).astype(np.int32, copy=False)
        self.cut_share = float((lengths > self.seq_len).mean()) if len(lengths) else 0.0
        self.inputs_total = int(self._lengths.sum())
        return len(self._starts)

    def pieces(self, indices: np.ndarray) -> Pieces:
        return Pieces(self._starts[indices], self._lengths[indices].astype(np.int64), np.ones_like(indices))


PACKINGS: dict[str, type[TokenSplit]] = {kind.packing: kind for kind in (TokenDataset, BestFitDataset, DocumentDataset)}


def open_dataset(path: str | Path, *, packing: str = "contiguous", **options) -> TokenSplit:
    """A split as samples of the kind that `packing` names; options and errors as of `TokenSplit`."""
    if packing not in PACKINGS:
        raise ValueError(f"packing {packing!r} is unknown; choose one of {', '.join(PACKINGS)}")
    return PACKINGS[packing](path, **options)


def _documents(shards: list) -> tuple[np.ndarray, np.ndarray]:
    """Start in the split's sequence of tokens, int64, and number of inputs, of every document that has any."""
    lengths = np.concatenate([np.empty(0, np.int32), *(shard.lengths for shard in shards)])
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    starts = starts[:-1]
    if len(lengths) and lengths.min() < 2:
        starts, lengths = starts[lengths > 1], lengths[lengths > 1]
    lengths -= 1
    return starts, lengths


def _longest_first(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices [P] of all pieces from the longest to the shortest, those of one length in their order; and how many
    there are of length capacity - n, for each n in [0, capacity).

    By counting, a part at a time: memory that was never used costs more time than the arithmetic in it.
    """
    # The room that is left and the place within a part in one number: numpy sorts numbers faster than it orders them.
    key_type = np.uint32 if capacity <= 2**32 // _SORTED_AT_ONCE else np.uint64
    parts = [lengths[start : start + _SORTED_AT_ONCE] for start in range(0, len(lengths), _SORTED_AT_ONCE)]
    counts = [np.bincount(capacity - part, minlength=capacity) for part in parts]
    totals = np.sum(counts, axis=0, dtype=np.int64) if parts else np.zeros(capacity, np.int64)
    order = np.empty(len(lengths), np.uint32 if len(lengths) < 2**32 else np.int64)
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
