"""Samples that keep documents whole: rows filled by best fit, or one document each without any padding.

A document of L tokens, its end-of-text token last, has L - 1 inputs, each with the token after it as its label; nothing
is predicted across documents, and attention stays within `document_ids`. Positions need no reset: rotary embeddings
make attention depend on distances only, so a document's outputs are those that it has alone, up to rounding.

Shapes: N samples, T = seq_len, P spans (documents, parts of those longer than T, and padding).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_pipeline.batches.best_fit import BestFit
from data_pipeline.batches.contiguous import TokenDataset
from data_pipeline.batches.reading import Spans, bounds, ranges
from data_pipeline.batches.token_split import TokenSplit


class BestFitDataset(TokenSplit):
    """Best-fit packing: sample i is a row of T inputs that holds whole documents, few of them cut, and little padding.

    Only documents with more than T inputs are cut: into spans of T, which are the first rows, and a rest. Each token
    but a document's first is predicted exactly once per epoch. The plan is the same wherever it is made. It takes 12
    bytes of memory per document, 8 per row that is one span of T, and about a hundred per group of alike rows; while it
    is made, these are about 30, 16 and a few hundred. Other attributes and errors are those of `TokenSplit`.

    Attributes:
        padding_share: The share of an epoch's inputs that is padding.
        cut_share: The share of the documents that is cut.
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

    def spans(self, indices: np.ndarray) -> Spans:
        """Return the spans of each row, from the longest to the shortest, and last its padding."""
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
        return Spans(starts_P, lengths_P, counts_N)


class DocumentDataset(TokenSplit):
    """Padding-free variable length, for fine-tuning: sample i is document i, cut after T inputs.

    A micro-batch is one row [1, N] of its documents one after the other, numbered by `document_ids`; there is no
    padding, however different their lengths. Documents of one token have nothing to predict and are left out. The
    dataset takes 12 bytes of memory per document. Other attributes and errors are those of `TokenSplit`.

    Attributes:
        cut_share: The share of the documents that is cut.
    """

    packing = "varlen"

    def _count_samples(self) -> int:
        self._starts, lengths = _documents(self._shards)
        self._lengths = np.minimum(lengths, self.seq_len).astype(np.int32, copy=False)
        self.cut_share = float((lengths > self.seq_len).mean()) if len(lengths) else 0.0
        self.inputs_total = int(self._lengths.sum())
        return len(self._starts)

    def spans(self, indices: np.ndarray) -> Spans:
        """Return one span for each document."""
        return Spans(self._starts[indices], self._lengths[indices].astype(np.int64), np.ones_like(indices))


PACKINGS: dict[str, type[TokenSplit]] = {kind.packing: kind for kind in (TokenDataset, BestFitDataset, DocumentDataset)}


def open_dataset(path: str | Path, *, packing: str = "contiguous", **options) -> TokenSplit:
    """Open a split as samples of the kind that `packing` names.

    Args:
        path: The directory of the dataset.
        packing: A name in `PACKINGS`.
        **options: Further arguments of `TokenSplit`.

    Raises:
        ValueError: There is no such packing, or what `TokenSplit` raises.
    """
    if packing not in PACKINGS:
        raise ValueError(f"packing {packing!r} is unknown; choose one of {', '.join(PACKINGS)}")
    return PACKINGS[packing](path, **options)


def _documents(shards: list) -> tuple[np.ndarray, np.ndarray]:
    """Return where every document that has inputs starts in the split's tokens, int64, and how many inputs it has."""
    lengths = np.concatenate([np.empty(0, np.int32), *(shard.lengths for shard in shards)])
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    starts = starts[:-1]
    if len(lengths) and lengths.min() < 2:
        starts, lengths = starts[lengths > 1], lengths[lengths > 1]
    lengths -= 1
    return starts, lengths
