"""Whole documents in and out of shards, and directories that appear whole or not at all."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.indexed import IndexedReader, IndexedWriter, TokenWriter
from data_pipeline.manifest import Shard
from data_pipeline.raw import RawReader

_BATCH_TOKENS = 1 << 20
_BATCH_DOCUMENTS = 1 << 16
_held: set[int] = set()


class SplitWriter:
    """Cuts one split into Megatron shards SPLIT-00000, SPLIT-00001, ... in `directory`, of whole documents and at most
    `shard_tokens` tokens (more only for a single longer document).

    source: what they are made of, for the manifest.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int, source: str | None = None):
        assert shard_tokens >= 1, shard_tokens
        self.directory, self.split, self.dtype, self.shard_tokens = directory, split, dtype, shard_tokens
        self.source = source
        self._shards: list[Shard] = []
        self._writer: IndexedWriter | None = None

    def add(self, tokens: np.ndarray) -> None:
        """Appends one document. tokens: integer ids [n], n >= 1."""
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Appends documents that follow each other in `tokens`; lengths: of each."""
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
        """The shards, all of them on disk. Nothing can be added any more."""
        self._end_shard()
        return self._shards

    def _end_shard(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            self._shards.append(shard_of(writer, self.source))


def shard_of(writer: TokenWriter, source: str | None = None) -> Shard:
    """The manifest's entry for what a closed writer wrote."""
    name, index_sha256, max_token = writer.prefix.name, writer.index_sha256, writer.max_token
    return Shard(name, writer.tokens, writer.documents, writer.sha256, index_sha256, max_token, source)


def document_batches(reader: IndexedReader | RawReader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, lengths) of the documents of a shard in order: about a million tokens at a time, or one longer document.

    tokens: ids in the shard's dtype, documents one after the other. lengths: tokens of each document.
    """
    first = position = 0
    while first < len(reader):
        ends = np.cumsum(reader.lengths[first : first + _BATCH_DOCUMENTS], dtype=np.int64)
        count = max(1, int(np.searchsorted(ends, _BATCH_TOKENS, side="right")))
        n_tokens = int(ends[count - 1])
        yield reader.file.read(position, n_tokens), reader.lengths[first : first + count]
        first, position = first + count, position + n_tokens


@contextlib.contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """.OUTPUT.tmp-*, removed at the end unless `publish` renamed it. It is locked while in use, so that what killed
    runs left behind can be told and swept.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for leftover in output.parent.glob(f".{glob.escape(output.name)}.tmp-*"):
        with contextlib.suppress(OSError), locked(leftover):
            shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.tmp-"))
    try:
        staging.chmod(0o755)
        with locked(staging):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def new_output(output: str | Path) -> Path:
    """`output` as an absolute path. Raises ValueError when something is there already."""
    output = Path(output).absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output}: exists; choose another output directory")
    return output


def publish(staging: Path, output: Path) -> None:
    """Renames a finished directory, whose files are on disk, to its place, which is empty or does not exist."""
    for directory in [path for path in staging.rglob("*") if path.is_dir()]:
        sync_directory(directory)
    sync_directory(staging)
    os.rename(staging, output)
    sync_directory(output.parent)


def sync_directory(directory: Path) -> None:
    """What was created or renamed in `directory` is still there after a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Raises BlockingIOError when another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def forget_locks() -> None:
    """For a forked process: the locks are its parent's, and end with that one."""
    while _held:
        os.close(_held.pop())
