"""Samples that keep documents whole: rows filled by best fit, or one document each without any padding.

A document of L tokens, its end-of-text token last, has L - 1 inputs, each with the token after it as its label; nothing
is predicted across documents, and attention stays within `document_ids`. Positions need no reset: rotary embeddings
make attention depend on distances only, so a document's outputs are those that it has alone, up to rounding.

Shapes: B samples, T = seq_len, P pieces (documents, or parts of those longer than T), N inputs in all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.dataset import IGNORED_LABEL, TokenDataset, TokenSplit


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit-decreasing bin packing: each piece, from the longest to the shortest, goes into the fullest row that has
    room for it ("Fewer Truncations Improve Language Modeling", arXiv:2404.10830).

    Pieces of one length are placed together: the fullest row with room r for length n takes r // n of them before
    another one is the fullest, so that the work is a handful of array operations per pair of a length and a room.
    Memory is about 35 bytes per piece while it runs; what is fresh memory costs more time than the arithmetic does.

    Args:
        lengths: int [P], each in [1, capacity].

    Returns:
        order [P] and bounds [rows + 1], int64: row i holds pieces order[bounds[i] : bounds[i + 1]].
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    # Ascending: numpy's stable sort of 16-bit integers is a radix sort.
    spare = np.empty(len(lengths), np.uint16 if capacity < 2**16 else np.int64)
    np.subtract(capacity, lengths, out=spare, casting="unsafe")
    by_length = np.argsort(spare, kind="stable")
    counts = np.bincount(spare, minlength=capacity)[::-1]  # counts[n - 1] pieces of length n
    del spare
    row_type = np.int32 if len(lengths) < 2**31 else np.int64
    row_of = np.empty(len(lengths), row_type)  # in the order of `by_length`
    stacks: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # rows by the room they have left
    has_rows = np.zeros(capacity + 1, bool)
    placed = n_rows = 0

    def fill(rows: np.ndarray, room: int, length: int, count: int) -> int:
        """Put up to `count` pieces into `rows`, each as full as it gets; returns how many."""
        nonlocal placed
        fit = room // length
        count = min(count, fit * len(rows))
        row_of[placed : placed + count] = np.repeat(rows, fit)[:count]
        placed += count
        full, rest = divmod(count, fit)
        for group, left in ((rows[:full], room - fit * length), (rows[full : full + 1], room - rest * length)):
            if left < room and left and len(group):
                stacks[left].append(group)
                has_rows[left] = True
        return count

    for length in (np.flatnonzero(counts)[::-1] + 1).tolist():
        left, room = int(counts[length - 1]), length
        while left and has_rows[room := room + int(has_rows[room:].argmax())]:  # the fullest that have room
            rows = stacks[room].pop()
            needed = -(-left // (room // length))
            if needed < len(rows):
                stacks[room].append(rows[needed:])
            has_rows[room] = bool(stacks[room])
            left -= fill(rows[:needed], room, length, left)
        if left:
            new = -(-left // (capacity // length))
            fill(np.arange(n_rows, n_rows + new, dtype=row_type), capacity, length, left)
            n_rows += new
    bounds = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=n_rows), out=bounds[1:])
    return by_length[np.argsort(row_of, kind="stable")], bounds


class BestFitDataset(TokenSplit):
    """Sample i is a row of T inputs that holds whole documents, chosen so that few are cut and little is padding.

    Only documents with more than T inputs are cut, into pieces of T and a rest; each token but a document's first is
    predicted exactly once per epoch. The plan takes 12 bytes of memory per piece and 8 per row, seconds per ten
    million, and is the same wherever it is made. Attributes and errors as in `TokenSplit`, and:

        padding_share: of the inputs of an epoch. cut_share: of the documents, how many are cut.
    """

    packing = "best_fit"

    def _count_samples(self) -> int:
        T, starts, lengths = self.seq_len, *_documents(self._shards)
        self.cut_share = float((lengths > T).mean()) if len(lengths) else 0.0
        if self.cut_share:
            parts = -(-lengths // T)
            part = _ranges(parts)
            starts = np.repeat(starts, parts) + part * T
            lengths = np.minimum(np.repeat(lengths, parts) - part * T, T)
        order, self._row_bounds = best_fit(lengths, T)
        self._starts, self._lengths = starts[order], lengths[order].astype(np.int32, copy=False)
        samples = len(self._row_bounds) - 1
        self.inputs_total = int(lengths.sum())
        self.padding_share = 1 - self.inputs_total / max(samples * T, 1)
        return samples

    def micro_batch(self, indices: np.ndarray, document_mask: bool = True) -> dict[str, np.ndarray]:
        """Arrays [B, T], see `TokenSplit`, always with `document_ids`. Padding, at the end of a row, is end-of-text
        tokens with labels -100 and a document id of its own.
        """
        indices, T = np.asarray(indices, dtype=np.int64), self.seq_len
        counts_B = self._row_bounds[indices + 1] - self._row_bounds[indices]
        chosen_P = np.repeat(self._row_bounds[indices], counts_B) + _ranges(counts_B)
        pieces = iter(self._read_pieces(self._starts[chosen_P], self._lengths[chosen_P]))
        input_ids_BT = np.full((len(indices), T), self.eot_id, np.int64)
        labels_BT = np.full((len(indices), T), IGNORED_LABEL, np.int64)
        documents_BT = np.empty((len(indices), T), np.int64)
        for inputs_T, labels_T, documents_T, count in zip(input_ids_BT, labels_BT, documents_BT, counts_B.tolist()):
            begin = 0
            for document in range(count):
                piece = next(pieces)
                end = begin + len(piece) - 1
                inputs_T[begin:end], labels_T[begin:end], documents_T[begin:end] = piece[:-1], piece[1:], document
                begin = end
            documents_T[begin:] = count
        return {"input_ids": input_ids_BT, "labels": labels_BT, "document_ids": documents_BT}


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
        indices = np.asarray(indices, dtype=np.int64)
        lengths_B = self._lengths[indices]
        pieces = self._read_pieces(self._starts[indices], lengths_B)
        parts = {
            "input_ids": np.concatenate([piece[:-1] for piece in pieces]),
            "labels": np.concatenate([piece[1:] for piece in pieces]),
            "document_ids": np.repeat(np.arange(len(indices)), lengths_B),
        }
        return {name: part.astype(np.int64)[None] for name, part in parts.items()}


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


def _ranges(counts: np.ndarray) -> np.ndarray:
    """[0, ..., counts[0] - 1, 0, ..., counts[1] - 1, ...]."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
