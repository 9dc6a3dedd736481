"""Prepared tokens as training samples, in an order that is a function of the seed.

Two views of the same splits: `TokenDataset` here cuts them into samples of T + 1 tokens whatever documents they cross;
`packing.py` keeps documents whole. `mixture.py` draws from several.

Shapes: N samples, T = seq_len.
"""

import bisect
import hashlib
import itertools
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.manifest import FILE_NAME, Manifest, open_shards
from data_pipeline.sampler import global_order
from data_pipeline.tokenizer import Tokenizer

IGNORED_LABEL = -100  # the default ignore_index of torch.nn.functional.cross_entropy


class TokenSplit(ABC):
    """One split of a prepared directory: its shards as one long sequence of tokens, of which a subclass makes samples.

    A *position* counts samples since the start of training; `order` maps it to the index of a sample, shuffled within
    each epoch by (seed, epoch); `micro_batch` reads samples by index. A `MixtureDataset` has the same three.

    Attributes: n_vocab, eot_id, tokens_total, documents_total, samples_per_epoch, inputs_total (tokens that an epoch
    trains on), manifest, content_sha256, manifest_sha256 (of the file), tokenizer (loaded on first use);
    positions_total: None, as positions never end.

    Raises ValueError, naming the file, when the directory is not a complete prepared dataset or has too few tokens for
    one sample.
    """

    packing: str
    """Its name in `packing.PACKINGS`."""
    plan_version = 1
    """Raised with every change of the code that makes other samples, or another order, of the same directory: a run
    that is resumed under another one would read some samples twice and others never."""
    positions_total = None
    inputs_total: int

    def __init__(self, path: str | Path, *, seq_len: int, split: str = "train", seed: int = 0, shuffle: bool = True):
        if seq_len < 1:
            raise ValueError(f"seq_len {seq_len}: must be at least 1")
        self.path = Path(path)
        self.seq_len, self.split, self.seed, self.shuffle = seq_len, split, seed, shuffle
        self.manifest = Manifest.read(path)
        self.content_sha256 = self.manifest.content_sha256
        self.manifest_sha256 = hashlib.sha256((self.path / FILE_NAME).read_bytes()).hexdigest()
        self.n_vocab: int = self.manifest.tokenizer["n_vocab"]
        self.eot_id: int = self.manifest.tokenizer["eot_id"]
        if split not in self.manifest.splits:
            raise ValueError(f"{path}: no split {split!r}, only {', '.join(self.manifest.splits)}")
        self._shards = open_shards(path, self.manifest, split)
        self._files = [shard.file for shard in self._shards]
        self._ends = list(itertools.accumulate(file.n_tokens for file in self._files))
        self._begins = [0, *self._ends]
        self.tokens_total = self.manifest.tokens(split)
        self.documents_total = self.manifest.documents(split)
        self.samples_per_epoch = self._count_samples()
        if self.samples_per_epoch < 1:
            raise ValueError(
                f"{path}: split {split!r} has {self.tokens_total} tokens, too few for one sample of seq_len + 1 = "
                f"{seq_len + 1}; prepare more text or a larger --validation-fraction, use a shorter seq_len"
                + (", or train with --validation.every 0" if split == "validation" else "")
            )

    @abstractmethod
    def _count_samples(self) -> int:
        """Samples in an epoch; called once, with the files open. Sets `inputs_total`."""

    @abstractmethod
    def micro_batch(self, indices: np.ndarray, document_mask: bool = False) -> dict[str, np.ndarray]:
        """Samples by index, int64 [B], each in [0, samples_per_epoch), as contiguous int64 arrays of one shape:

        `input_ids`; `labels`, the token after each input, or -100 where none is to be predicted; and with
        `document_mask`, or where the packing needs it, `document_ids`, non-decreasing along each row.

        Raises IndexError for an index out of range.
        """

    def _checked(self, indices: np.ndarray) -> list[int]:
        found = np.asarray(indices).tolist()
        for index in found:
            if not 0 <= index < self.samples_per_epoch:
                raise IndexError(f"{self.path}: sample {index} is none of 0 to {self.samples_per_epoch - 1}")
        return found

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.load(self.path)
        if tokenizer.sha256 != self.manifest.tokenizer["sha256"]:
            raise ValueError(f"{self.path}: the tokenizer there is not the one that made its tokens")
        return tokenizer

    def order(self, positions: np.ndarray) -> np.ndarray:
        """Index of the sample at each global position, int64 of any shape; position p lies in epoch
        p // samples_per_epoch.
        """
        return global_order(positions, self.samples_per_epoch, seed=self.seed, shuffle=self.shuffle)

    def _read_pieces(self, pieces: list[tuple[int, int, int]], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, int64 [count], of pieces of the long sequence: (start there, length, place here) each,
        with the token after each input as its label. Where no piece is, inputs are end-of-text.
        """
        dtype, size = self._files[0].dtype, self._files[0].dtype.itemsize
        tokens, after = np.full(count, self.eot_id, dtype), np.empty(len(pieces), dtype)
        into, last = memoryview(tokens).cast("B"), memoryview(after).cast("B")
        for p, (start, length, place) in enumerate(pieces):
            shard = bisect.bisect_right(self._ends, start)
            file, begin = self._files[shard], start - self._begins[shard]
            if file.n_tokens - begin > length:
                file.read_into(begin, into[place * size : (place + length) * size], last[p * size : (p + 1) * size])
            else:
                piece = self._read_across(shard, begin, length + 1)
                tokens[place : place + length], after[p] = piece[:-1], piece[-1]
        labels = np.empty(count, np.int64)
        labels[:-1] = tokens[1:]
        labels[[place + length - 1 for _, length, place in pieces]] = after
        return tokens.astype(np.int64), labels

    def _read_across(self, shard: int, start: int, count: int) -> np.ndarray:
        """Ids [count] that begin in one shard and end in another."""
        parts = []
        while count:
            parts.append(self._files[shard].read(start, min(count, self._files[shard].n_tokens - start)))
            shard, start, count = shard + 1, 0, count - len(parts[-1])
        return np.concatenate(parts)


class TokenDataset(TokenSplit):
    """Contiguous packing: sample i is tokens [i*T, i*T + T] of the split, so each token is predicted once per epoch
    (bar an incomplete sample at the end), and documents begin and end anywhere in a sample.

    Attributes and errors as in `TokenSplit`.
    """

    packing = "contiguous"

    def _count_samples(self) -> int:
        samples = max(self.tokens_total - 1, 0) // self.seq_len
        self.inputs_total = samples * self.seq_len
        return samples

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Tokens int64 [N, T+1] at global positions, int64 [N]."""
        return self.read(self.order(positions))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Tokens int64 [N, T+1] of samples by index, each in [0, samples_per_epoch), in the order of the text."""
        arrays = self.micro_batch(indices)
        return np.concatenate([arrays["input_ids"], arrays["labels"][:, -1:]], axis=1)

    def micro_batch(self, indices: np.ndarray, document_mask: bool = False) -> dict[str, np.ndarray]:
        """Arrays [B, T], see `TokenSplit`. `document_ids` count from 0 in each row; the end-of-text token belongs to
        the document it ends, and its label, the first token of another document, is then -100.
        """
        T = self.seq_len
        pieces = [(index * T, T, row * T) for row, index in enumerate(self._checked(indices))]
        inputs, labels = self._read_pieces(pieces, len(pieces) * T)
        arrays = {"input_ids": inputs, "labels": labels}
        if document_mask:
            (ends,) = (inputs == self.eot_id).nonzero()
            labels[ends] = IGNORED_LABEL
            rows = np.arange(0, len(inputs) + 1, T)
            edges = np.concatenate([rows, ends[ends % T != T - 1] + 1])
            edges.sort()
            numbers = np.arange(len(edges) - 1) - edges.searchsorted(rows)[edges[:-1] // T]
            # From the few edges: a cumsum over all tokens takes longer.
            arrays["document_ids"] = numbers.repeat(edges[1:] - edges[:-1])
        return {name: array.reshape(-1, T) for name, array in arrays.items()}
