"""Samples by index, read as micro-batches.

Where a micro-batch's tokens are, its read plan, is worked out for many micro-batches at a time, so that little but
system calls is left to do for each. For example, this is a sample of T = 6 inputs, packed by best fit. It holds two
documents whose tokens are at 10 to 13 and 40 to 41 of one file (their last token is end-of-text, E, and only a label),
and padding:

    span            start 10, 3 inputs     start 40, 1 input     padding, 2 inputs
    read            tokens 10 to 13        tokens 40 to 41       nothing
    input_ids       t10  t11  t12          t40                   E    E
    labels          t11  t12  t13          t41                   -100 -100
    document_ids    0    0    0            1                     2    2

A span is read with one token more than it has inputs, its last label; the next span is put over it.

Shapes: M micro-batches of B samples each, N samples in all, T = seq_len; P spans, what a sample holds of one document
or its padding; R spans that are read, all but padding.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.shards.token_files import JoinedFiles, TokenFile, read_parts

IGNORED_LABEL = -100  # the default ignore_index of torch.nn.functional.cross_entropy


class Spans(NamedTuple):
    """What N samples hold, one after the other."""

    starts_P: np.ndarray
    """Place of each span's first input in the sequence of all tokens, or -1 for padding, int64."""
    lengths_P: np.ndarray
    """Inputs of each span, int64."""
    counts_N: np.ndarray
    """Spans of each sample, int64."""


class ReadPlan(NamedTuple):
    """A micro-batch, its samples one after the other, that was not read yet. Places count its inputs from 0."""

    inputs: int
    """Number of inputs of all samples together."""
    reads_R4: np.ndarray
    """For each span that is read: which of `_readers`, the byte position in its file, and the first and one after the
    last place. The span is read with one token more than it has inputs, which is its last label."""
    last_R: np.ndarray
    """Place of the last input of each span that is read."""
    paddings: list[tuple[int, int]]
    """The first and one after the last place of each padding."""
    numbers_P: np.ndarray
    """The document id of each span, padding included."""
    widths_P: np.ndarray
    """The number of inputs of each span, all of which have that id."""


class Samples(ABC):
    """A number of samples, of which micro-batches are made by index: a `TokenSplit`, or a mixture of them.

    A subclass sets the attributes below (`files` by `_set_files`), and defines `order` and `spans`.
    """

    packing: str
    """The name of the packing in `documents.PACKINGS`."""
    path: Path | str
    """What messages call the data."""
    seq_len: int
    eot_id: int
    """The end-of-text token."""
    samples_per_epoch: int
    inputs_total: int
    """Tokens that an epoch trains on."""
    positions_total: int | None = None
    """The position where the data end; None where they never do."""
    files: list[TokenFile]
    """The files of all tokens, one after the other."""

    @abstractmethod
    def order(self, positions: np.ndarray) -> np.ndarray:
        """Return the index of the sample at each global position, int64 of any shape."""

    @abstractmethod
    def spans(self, indices: np.ndarray) -> Spans:
        """Return the spans of samples by index.

        Args:
            indices: Indices of samples, int64 [N], each in [0, samples_per_epoch).
        """

    def micro_batch(self, indices: np.ndarray, document_mask: bool = False) -> dict[str, np.ndarray]:
        """Read samples by index.

        Shapes and document ids depend on the packing:

        - contiguous: [B, T]. Ids count from 0 in each row. With document ids, the end-of-text token belongs to the
          document that it ends, and its label, the first token of another one, is -100.
        - best_fit: [B, T]. Ids count from 0 in each row. Padding, at its end, is end-of-text tokens with labels -100
          and an id of its own.
        - varlen: [1, inputs], the documents one after the other. The id of the b-th of `indices` is b.

        Args:
            indices: Indices of samples, int64 [B].
            document_mask: Give `document_ids` also where the packing does not need them.

        Returns:
            Contiguous int64 arrays of one shape: `input_ids`; `labels`, the token after each input, or -100 where none
            is to be predicted; and perhaps `document_ids`, non-decreasing along each row.

        Raises:
            IndexError: An index is out of range.
            ValueError: A file cannot be read; the message names it.
        """
        indices = np.asarray(indices).astype(np.int64, casting="same_kind")
        (read_plan,) = self.read_plans(indices, [len(indices)])
        return self.fill(read_plan, document_mask)

    def read_plans(self, indices: np.ndarray, sizes: Sequence[int]) -> list[ReadPlan]:
        """Return the read plans of M micro-batches.

        Thousands of samples take little more time than one. A plan takes some 200 bytes for each span.

        Args:
            indices: Indices of all samples, int64 [N], those of one micro-batch after those of the other.
            sizes: Number of samples of each micro-batch, [M].

        Raises:
            IndexError: An index is out of range.
        """
        assert sum(sizes) == len(indices), (sizes, len(indices))
        out_of_range = indices[(indices < 0) | (indices >= self.samples_per_epoch)]
        if out_of_range.size:
            raise IndexError(f"{self.path}: sample {out_of_range[0]} is none of 0 to {self.samples_per_epoch - 1}")
        starts, lengths, counts = self.spans(indices)
        batches = bounds(counts)[bounds(sizes)]  # the spans of each micro-batch
        inputs = bounds(lengths)[batches]
        places = bounds(lengths)[:-1] - np.repeat(inputs[:-1], np.diff(batches))
        alike = np.diff(batches) if self.packing == "varlen" else counts  # spans that are numbered together
        numbers = ranges(np.zeros_like(alike), alike)

        (padding,), (held,) = (starts < 0).nonzero(), (starts >= 0).nonzero()
        start, first, last = starts[held], places[held], places[held] + lengths[held] - 1
        file = self._file_bounds.searchsorted(start, side="right") - 1
        position = self._offsets[file] + (start - self._file_bounds[file]) * self._itemsizes[file]
        file[start + lengths[held] >= self._file_bounds[file + 1]] += len(self.files)  # goes on in the next file
        reads = np.stack([file, position, first, last + 2], axis=1)
        paddings = list(zip(places[padding].tolist(), (places + lengths)[padding].tolist()))
        parts = (slices(bound) for bound in (batches, held.searchsorted(batches), padding.searchsorted(batches)))
        return [
            ReadPlan(size, reads[r], last[r], paddings[d], numbers[p], lengths[p])
            for size, p, r, d in zip(np.diff(inputs).tolist(), *parts)
        ]

    def fill(self, read_plan: ReadPlan, document_mask: bool = False) -> dict[str, np.ndarray]:
        """Read a micro-batch. Several threads may do so at once.

        Args:
            read_plan: One that `read_plans` returned.
            document_mask: Give `document_ids` also where the packing does not need them.

        Returns:
            The arrays that `micro_batch` describes.

        Raises:
            ValueError: A file cannot be read; the message names it.
        """
        tokens = np.empty(read_plan.inputs + 1, self._dtype)
        after = read_parts(self._readers, read_plan.reads_R4.tolist(), tokens.data)
        for first, end in read_plan.paddings:
            tokens[first:end] = self.eot_id
        inputs, labels = tokens[:-1].astype(np.int64), tokens[1:].astype(np.int64)
        labels[read_plan.last_R] = after
        for first, end in read_plan.paddings:
            labels[first:end] = IGNORED_LABEL
        arrays = {"input_ids": inputs, "labels": labels}
        if self.packing != "contiguous":
            arrays["document_ids"] = read_plan.numbers_P.repeat(read_plan.widths_P)
        elif document_mask:
            (ends,) = (tokens[:-1] == self.eot_id).nonzero()
            labels[ends] = IGNORED_LABEL
            arrays["document_ids"] = _document_ids(ends, len(inputs), self.seq_len)
        T = read_plan.inputs if self.packing == "varlen" else self.seq_len
        rows = 1 if self.packing == "varlen" else read_plan.inputs // T
        return {name: array.reshape(rows, T) for name, array in arrays.items()}

    def _set_files(self, files: Sequence[TokenFile]) -> None:
        self.files = list(files)
        self._file_bounds = bounds([file.n_tokens for file in files])
        self._dtype = np.result_type(np.uint16, *(file.dtype for file in files))
        self._offsets = np.array([file.offset for file in files], np.int64)
        self._itemsizes = np.array([file.dtype.itemsize for file in files], np.int64)
        # For each file, what reads from it alone; then, for each, what reads on in the next ones, and converts.
        joined = [JoinedFiles(self.files, number) for number in range(len(self.files))]
        alone = (file if file.dtype == self._dtype else other for file, other in zip(self.files, joined))
        self._readers = [*alone, *joined]


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return start, start + 1 and so on, `count` numbers for each start, one after the other, int64."""
    places = bounds(counts)
    return np.arange(places[-1]) + np.repeat(starts - places[:-1], counts)


def bounds(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return 0, and the sum of each count and those before it, int64."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def slices(edges: np.ndarray) -> list[slice]:
    """Return the slices from each of the edges to the next."""
    return [slice(start, stop) for start, stop in itertools.pairwise(edges.tolist())]


def _document_ids(ends: np.ndarray, count: int, seq_len: int) -> np.ndarray:
    """Return the document ids of rows of contiguous packing, int64 [count].

    Args:
        ends: Places of end-of-text tokens, ascending.
        count: Number of tokens of all rows.
        seq_len: Tokens of a row.
    """
    rows = np.arange(0, count + 1, seq_len)
    edges = np.concatenate([rows, ends[ends % seq_len != seq_len - 1] + 1])
    edges.sort()
    numbers = np.arange(len(edges) - 1) - edges.searchsorted(rows)[edges[:-1] // seq_len]
    # From the few edges: a cumsum over all tokens takes longer.
    return numbers.repeat(edges[1:] - edges[:-1])
