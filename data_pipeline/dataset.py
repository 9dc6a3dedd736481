"""Prepared tokens as training samples, in an order that is a function of the seed.

Two views of the same splits: `TokenDataset` here cuts them into samples of T + 1 tokens whatever documents they cross;
`packing.py` keeps documents whole. `mixture.py` draws from several.

Shapes: N samples, T = seq_len.
"""

import hashlib
from abc import ABC, abstractmethod
from functools import cached_property
from itertools import pairwise
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
        self._ends = np.cumsum([file.n_tokens for file in self._files], dtype=np.int64)
        self._begins = np.concatenate([[0], self._ends])
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
        """

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

    def _read_spans(self, starts: np.ndarray, spans: list[np.ndarray]) -> None:
        """Fill each of `spans`, contiguous and of the files' dtype, with tokens from its start in the long sequence."""
        shards = np.searchsorted(self._ends, starts, side="right")
        offsets = starts - self._begins[shards]
        for span, offset, shard in zip(spans, offsets.tolist(), shards.tolist()):
            while (count := self._files[shard].n_tokens - offset) < len(span):
                self._files[shard].read_into(offset, span[:count])
                span, offset, shard = span[count:], 0, shard + 1
            self._files[shard].read_into(offset, span)

    def _read_pieces(self, starts: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Pieces of lengths[p] inputs and the token after them, from position starts[p] of the long sequence on; in the
        files' dtype.
        """
        bounds = [0, *np.cumsum(lengths + 1).tolist()]
        tokens = np.empty(bounds[-1], dtype=self._files[0].dtype)
        pieces = [tokens[a:b] for a, b in pairwise(bounds)]
        self._read_spans(starts, pieces)
        return pieces


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
        return self._read(indices).astype(np.int64)

    def micro_batch(self, indices: np.ndarray, document_mask: bool = False) -> dict[str, np.ndarray]:
        """Arrays [B, T], see `TokenSplit`. `document_ids` count from 0 in each row; the end-of-text token belongs to
        the document it ends, and its label, the first token of another document, is then -100.
        """
        tokens_BT1 = self._read(indices)
        inputs_BT, labels_BT = tokens_BT1[:, :-1].astype(np.int64), tokens_BT1[:, 1:].astype(np.int64)
        arrays = {"input_ids": inputs_BT, "labels": labels_BT}
        if document_mask:
            ends_BT = inputs_BT == self.eot_id
            labels_BT[ends_BT] = IGNORED_LABEL
            documents_BT = np.zeros_like(inputs_BT)
            documents_BT[:, 1:] = ends_BT[:, :-1]
            np.cumsum(documents_BT, axis=1, out=documents_BT)  # twice as fast in place as from bool
            arrays["document_ids"] = documents_BT
        return arrays

    def _read(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices, dtype=np.int64)
        tokens = np.empty((len(indices), self.seq_len + 1), dtype=self._files[0].dtype)
        self._read_spans(indices * self.seq_len, list(tokens))
        return tokens
