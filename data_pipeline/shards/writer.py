"""Whole documents in and out of shards."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.megatron import IndexedReader, IndexedWriter, TokenWriter
from data_pipeline.shards.raw import RawReader
from data_pipeline.tokenizer.tokenizer import Tokenizer

_BATCH_TOKENS = 1 << 20
_BATCH_DOCUMENTS = 1 << 16


class SplitWriter:
    """A writer of one split as Megatron shards SPLIT-00000, SPLIT-00001, ... of whole documents.

    Args:
        directory: Where they go.
        split: Begins their names.
        dtype: Type of the ids on disk.
        shard_tokens: The most tokens of a shard; only a single longer document makes a longer one.
        source: What they are made of, for the manifest.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int, source: str | None = None):
        assert shard_tokens >= 1, shard_tokens
        self.directory, self.split, self.dtype, self.shard_tokens = directory, split, dtype, shard_tokens
        self.source = source
        self._shards: list[Shard] = []
        self._writer: IndexedWriter | None = None

    def add(self, tokens: np.ndarray) -> None:
        """Append one document.

        Args:
            tokens: Integer ids [n], n >= 1.
        """
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append documents that follow each other.

        Args:
            tokens: Integer ids of all of them.
            lengths: Tokens of each document.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        first = position = 0
        while first < len(ends):
            room = self.shard_tokens - (self._writer.tokens if self._writer else 0)
            stop = int(np.searchsorted(ends, position + room, side="right"))
            if stop <= first and self._writer is not None:
                self._end_shard()
                continue
            stop = max(stop, first + 1)
            if self._writer is None:
                self._writer = IndexedWriter(self.directory / f"{self.split}-{len(self._shards):05d}", self.dtype)
            self._writer.add_documents(tokens[position : ends[stop - 1]], lengths[first:stop])
            first, position = stop, int(ends[stop - 1])

    def close(self) -> list[Shard]:
        """Complete the last shard, and return all shards, which are on disk; nothing can be added any more."""
        self._end_shard()
        return self._shards

    def _end_shard(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            self._shards.append(shard_of(writer, self.source))


def documents_of_ids(ids: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the documents in a row of token ids, each ended by end-of-text; empty ones are left out.

    What ends with end-of-text is a document, and so is what comes after the last of these.

    Raises:
        ValueError: An id is none of the tokenizer's.
    """
    if not len(ids):
        return []
    for number in (int(ids.min()), int(ids.max())):
        if not 0 <= number < tokenizer.n_vocab:
            raise ValueError(
                f"token id {number} is not one of the {tokenizer.n_vocab} ids of tokenizer {tokenizer.name}; name the "
                f"--tokenizer that made these ids"
            )
    if ids[-1] != tokenizer.eot_id:
        ids = np.append(ids, tokenizer.eot_id)
    ends = np.flatnonzero(ids == tokenizer.eot_id) + 1
    parts = [ids] if len(ends) == 1 else np.split(ids, ends)
    return [part for part in parts if len(part) > 1]


def shard_of(writer: TokenWriter, source: str | None = None) -> Shard:
    """Return the manifest's entry for what a closed writer wrote."""
    name, index_sha256, max_token = writer.prefix.name, writer.index_sha256, writer.max_token
    return Shard(name, writer.tokens, writer.documents, writer.sha256, index_sha256, max_token, source)


def document_batches(reader: IndexedReader | RawReader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the documents of a shard in order, about a million tokens at a time, or one longer document.

    Yields:
        Ids of documents that follow each other, in the shard's dtype, and the tokens of each document.
    """
    first = position = 0
    while first < len(reader):
        ends = np.cumsum(reader.lengths[first : first + _BATCH_DOCUMENTS], dtype=np.int64)
        count = max(1, int(np.searchsorted(ends, _BATCH_TOKENS, side="right")))
        n_tokens = int(ends[count - 1])
        yield reader.file.read(position, n_tokens), reader.lengths[first : first + count]
        first, position = first + count, position + n_tokens
