"""One split of a prepared dataset as samples, in an order that is a function of the seed.

`contiguous.py` and `documents.py` say which tokens a sample holds; `mixture.py` draws from several splits.
"""

import hashlib
from abc import abstractmethod
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.batches.order import global_order
from data_pipeline.batches.reading import Samples
from data_pipeline.shards.manifest import FILE_NAME, Manifest, open_shards
from data_pipeline.tokenizer.tokenizer import Tokenizer


class TokenSplit(Samples):
    """One split of a prepared directory: its shards as one long sequence of tokens, of which a subclass makes samples.

    A *position* counts samples since the start of training; `order` maps it to the index of a sample, shuffled within
    each epoch by (seed, epoch); `micro_batch` reads samples by index. Positions never end: `positions_total` is None.

    Args:
        path: The prepared directory.
        seq_len: Inputs of a sample, T.
        split: `train` or `validation`.
        seed: The seed of the order.
        shuffle: Whether samples are shuffled within each epoch.

    Attributes:
        manifest: What manifest.json says.
        manifest_sha256: The SHA-256 of that file.
        content_sha256: A hash of the dataset's tokens and what they mean (see `Manifest`).
        n_vocab: The number of the tokenizer's ids.
        eot_id: The end-of-text token.
        tokens_total: The tokens of the split.
        documents_total: The documents of the split.
        samples_per_epoch: The samples of the split.
        inputs_total: The tokens that an epoch trains on.

    Raises:
        ValueError: The directory is not a complete prepared dataset, or has too few tokens for one sample. The message
            names the file.
    """

    plan_version = 1
    """Raised with every change of the code that makes other samples, or another order, of the same directory: a run
    that is resumed under another version would read some samples twice and others never."""

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
        self._set_files([shard.file for shard in self._shards])
        self.tokens_total = self.manifest.tokens(split)
        self.documents_total = self.manifest.documents(split)
        self.samples_per_epoch = self._count_samples()
        if self.samples_per_epoch < 1:
            remedy = "prepare more text or use a shorter seq_len"
            if split == "validation":
                remedy = f"{remedy}, prepare with a larger --validation-fraction, or train with --validation.every 0"
            raise ValueError(
                f"{path}: split {split!r} has {self.tokens_total} tokens, too few for one sample of seq_len + 1 = "
                f"{seq_len + 1}; {remedy}"
            )

    @abstractmethod
    def _count_samples(self) -> int:
        """Return the number of samples in an epoch, and set `inputs_total`; called once, with the files open."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the split was made with, loaded on first use."""
        tokenizer = Tokenizer.load(self.path)
        if tokenizer.sha256 != self.manifest.tokenizer["sha256"]:
            raise ValueError(f"{self.path}: the tokenizer there is not the one that made its tokens")
        return tokenizer

    def order(self, positions: np.ndarray) -> np.ndarray:
        """Return the index of the sample at each global position, int64 of any shape.

        Position p lies in epoch p // samples_per_epoch.
        """
        return global_order(positions, self.samples_per_epoch, seed=self.seed, shuffle=self.shuffle)
