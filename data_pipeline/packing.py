"""Samples that keep documents whole: rows filled by best fit, or one document each without any padding.

A document of L tokens, its end-of-text token last, has L - 1 inputs, each with the token after it as its label; nothing
is predicted across documents, and attention stays within `document_ids`. Positions need no reset: rotary embeddings
make attention depend on distances only, so a document's outputs are those that it has alone, up to rounding.

Shapes: B samples, T = seq_len, P pieces (documents, or parts of those longer than T), N inputs in all.
"""

from __future__ import annotations

import bisect
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.dataset import IGNORED_LABEL, TokenDataset, TokenSplit

_SORTED_AT_ONCE = 1 << 20


class _Content(NamedTuple):
    """What each row of a group holds: `each` pieces of `length`, and what was put in `before` them.

    Row i has those at the places placed + (i - first) * each and on, in the order of all pieces.
    """

    length: int
    each: int
    first: int
    placed: int
    before: _Content | None


class _Group(NamedTuple):
    """Rows [first, stop), which hold pieces of the same lengths."""

    first: int
    stop: int
    content: _Content | None


class BestFit:
    """Best-fit-decreasing bin packing: each piece, from the longest to the shortest, goes into the fullest row that has
    room for it ("Fewer Truncations Improve Language Modeling", arXiv:2404.10830).

    Pieces of one length are placed together: the fullest row with room r for length n takes r // n of them before
    another one is the fullest. Rows that hold the same lengths are kept as one group, so that work and memory, but for
    sorting, grow with the groups (thousands to some hundred thousand, by capacity) and not with the pieces. Memory: 4
    bytes per piece and a few hundred per group.

    lengths: int [P], each in [1, capacity]. `len` is the number of rows, `row(i)` what row i in [0, len) holds.
    """

    def __init__(self, lengths: np.ndarray, capacity: int):
        assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
        self._order, counts = _longest_first(lengths, capacity)
        self._rows, self._placed = 0, 0
        self._groups: list[_Group] = []  # those that take no more
        self._open: list[list[_Group]] = [[] for _ in range(capacity + 1)]  # by the room they have left
        self._is_open = np.zeros(capacity + 1, bool)
        for spare in np.flatnonzero(counts).tolist():
            self._place(capacity - spare, int(counts[spare]), capacity)
        self._groups += itertools.chain.from_iterable(self._open)
        self._groups.sort(key=lambda group: group.first)
        self._firsts = [group.first for group in self._groups]
        del self._open, self._is_open

    def __len__(self) -> int:
        return self._rows

    def row(self, i: int) -> list[tuple[int, int]]:
        """(index, length) of the pieces, from the longest to the shortest."""
        assert 0 <= i < self._rows, (i, self._rows)
        content, found = self._groups[bisect.bisect_right(self._firsts, i) - 1].content, []
        while content is not None:
            length, each, first, placed, content = content
            begin = placed + (i - first) * each
            found += [(self._order.item(place), length) for place in range(begin, begin + each)]
        return found[::-1]

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
            self._fill(_Group(first, self._rows, None), capacity, length, count)

    def _fill(self, group: _Group, room: int, length: int, count: int) -> int:
        """Put up to `count` pieces into the rows of a group, each as full as it gets; returns how many."""
        first, stop, content = group
        each = room // length
        count = min(count, each * (stop - first))
        middle, rest = first + count // each, count % each
        for begin, end, pieces in ((first, middle, each), (middle, middle + 1, rest)):
            if begin < end and pieces:
                left = room - pieces * length
                filled = _Group(begin, end, _Content(length, pieces, begin, self._placed, content))
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
    bytes per document, 8 per row that is a piece of T, and a few hundred per group of alike rows; while it is made
    about 30 and 16. Attributes and errors as in `TokenSplit`, and:

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

    def _row(self, index: int) -> list[tuple[int, int]]:
        """(start, length) of the pieces of a sample."""
        full = len(self._full_rows)
        if index < full:
            return [(self._full_rows.item(index), self.seq_len)]
        return [(self._starts.item(piece), length) for piece, length in self._plan.row(index - full)]

    def micro_batch(self, indices: np.ndarray, document_mask: bool = True) -> dict[str, np.ndarray]:
        """Arrays [B, T], see `TokenSplit`, always with `document_ids`. Padding, at the end of a row, is end-of-text
        tokens with labels -100 and a document id of its own.
        """
        T = self.seq_len
        pieces, numbers, widths, paddings = [], [], [], []
        for row, index in enumerate(self._checked(indices)):
            place, end = row * T, row * T + T
            for number, (start, length) in enumerate(self._row(index)):
                pieces.append((start, length, place))
                numbers.append(number)
                widths.append(length)
                place += length
            if place < end:
                paddings.append(slice(place, end))
                numbers.append(number + 1)
                widths.append(end - place)
        inputs, labels = self._read_pieces(pieces, len(indices) * T)
        for padding in paddings:
            labels[padding] = IGNORED_LABEL
        arrays = {"input_ids": inputs, "labels": labels, "document_ids": np.repeat(numbers, widths)}
        return {name: array.reshape(-1, T) for name, array in arrays.items()}


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

    def micro_batch(self, indices: np.ndarray, document_mask: bool = True) -> dict[str, np.ndarray]:
        """Arrays [1, N], see `TokenSplit`, always with `document_ids`: b for the b-th of `indices`."""
        indices = self._checked(indices)
        starts, lengths = self._starts[indices].tolist(), self._lengths[indices].tolist()
        *places, count = itertools.accumulate(lengths, initial=0)
        inputs, labels = self._read_pieces(list(zip(starts, lengths, places)), count)
        documents = np.repeat(np.arange(len(lengths)), lengths)
        return {"input_ids": inputs[None], "labels": labels[None], "document_ids": documents[None]}


PACKINGS: dict[str, type[TokenSplit]] = {kind.packing: kind for kind in (TokenDataset, BestFitDataset, DocumentDataset)}


def open_dataset(path: str | Path, *, packing: str = "contiguous", **options) -> TokenSplit:
    """A split as samples of the kind that `packing` names; options and errors as of `TokenSplit`."""
    if packing not in PACKINGS:
        raise ValueError(f"packing {packing!r} is unknown; choose one of {', '.join(PACKINGS)}")
    return PACKINGS[packing](path, **options)


def _documents(shards: list) -> tuple[np.ndarray, np.ndarray]:
    """Start in the split's sequence of tokens, int64, and number of inputs, of every document that has any."""
    lengths = np.concatenate([np.empty(0, np.int32), *(shard.lengths for shard in shards)])
    starts = np.cumsum(lengths, dtype=np.int64)
    starts -= lengths
    if len(lengths) and lengths.min() < 2:
        starts, lengths = starts[lengths > 1], lengths[lengths > 1]
    lengths -= 1
    return starts, lengths


def _longest_first(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices [P] of all pieces from the longest to the shortest, those of one length in their order; and how many
    there are of length capacity - n, for each n in [0, capacity).

    By counting, a part at a time: memory that was never used costs more time than the arithmetic in it.
    """
    # For 16-bit integers numpy's stable sort is a radix sort.
    spare_type = np.uint16 if capacity < 2**16 else np.int64
    starts = range(0, len(lengths), _SORTED_AT_ONCE)
    parts = [slice(start, start + _SORTED_AT_ONCE) for start in starts]
    counts = [np.bincount((capacity - lengths[part]).astype(spare_type), minlength=capacity) for part in parts]
    totals = np.sum(counts, axis=0, dtype=np.int64) if parts else np.zeros(capacity, np.int64)
    order = np.empty(len(lengths), np.uint32 if len(lengths) < 2**32 else np.int64)
    free = np.cumsum(totals) - totals
    for part, count in zip(parts, counts):
        sorted_part = np.argsort((capacity - lengths[part]).astype(spare_type), kind="stable")
        places = np.repeat(free - (np.cumsum(count) - count), count) + np.arange(len(sorted_part))
        order[places] = sorted_part + part.start
        free += count
    return order, totals
