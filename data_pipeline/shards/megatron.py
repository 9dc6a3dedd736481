r"""Megatron-LM's indexed dataset: a `.bin` file of token ids and an `.idx` file that says where each document starts.

Layout of `.idx`, little endian, as written by Megatron-LM's `IndexedDatasetBuilder`
(megatron/core/datasets/indexed_dataset.py):

    bytes   9        b"MMIDIDX\0\0"
    uint64  1        version, 1
    uint8   1        dtype code of the tokens: 8 = uint16, 4 = int32 (there is no code for uint32)
    uint64  1        number of sequences, S
    uint64  1        length of the document index, D + 1
    int32   S        tokens in each sequence
    int64   S        byte offset of each sequence in `.bin`
    int64   D + 1    first sequence of each document, then S

We write one sequence per document.
"""

import bisect
import ctypes
import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from data_pipeline.disk import finish, sync_file, unfinished
from data_pipeline.shards.token_files import TokenFile, file_status

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES: dict[int, np.dtype] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
_HEADER = struct.Struct("<9sQBQQ")
_CHECK_SEQUENCES = 1 << 20
_WRITE_AHEAD_BYTES = 1 << 20


def token_dtype(n_vocab: int) -> np.dtype:
    """Return the dtype of token ids: uint16 for vocabularies of up to 65,535 ids, int32 beyond."""
    return DTYPE_CODES[8] if n_vocab <= 65_535 else DTYPE_CODES[4]


def data_path(prefix: Path | str) -> Path:
    """Return the path of the file of token ids."""
    return Path(f"{prefix}.bin")


def index_path(prefix: Path | str) -> Path:
    """Return the path of the file that says where documents are."""
    return Path(f"{prefix}.idx")


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """Return the content of the `.idx` file for documents of `lengths` tokens, int32, one after the other."""
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1].astype(np.int64) * dtype.itemsize, out=pointers[1:])
    code = next(code for code, known in DTYPE_CODES.items() if known == dtype)
    header = _HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1)
    numbers = (lengths.astype("<i4"), pointers, np.arange(len(lengths) + 1, dtype="<i8"))
    return header + b"".join(array.tobytes() for array in numbers)


class TokenWriter:
    """A writer of the file `path` of ids alone, which appears on `close`, whole and on disk.

    Until then the file has another name.

    Attributes:
        tokens: Tokens written so far.
        documents: Documents written so far.
        max_token: The largest id written so far.
    """

    index_sha256: str | None = None
    """Hash of the index, if the writer makes one."""

    def __init__(self, path: Path | str, dtype: np.dtype):
        self.prefix = self._path = Path(path)
        self.dtype = np.dtype(dtype)
        self.tokens = self.documents = self.max_token = 0
        self._on_its_way = 0
        self._hash = hashlib.sha256()
        self._file = open(unfinished(self._path), "wb")  # noqa: SIM115 (closed by close or __exit__)

    @property
    def sha256(self) -> str:
        """Hash of what was written so far."""
        return self._hash.hexdigest()

    def add_documents(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append documents that follow each other, each with its end-of-text token.

        Args:
            tokens: Integer ids of all of them, within the range of the dtype.
            lengths: Tokens of each document.
        """
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B")
        self._file.write(data)
        self._hash.update(data)
        self.documents += len(lengths)
        self.tokens += len(tokens)
        self.max_token = max(self.max_token, int(tokens.max(initial=0)))
        size = self.tokens * self.dtype.itemsize
        if size - self._on_its_way >= _WRITE_AHEAD_BYTES:
            self._file.flush()
            _begin_writing_out(self._file.fileno(), self._on_its_way, size - self._on_its_way)
            self._on_its_way = size

    def close(self) -> None:
        """Wait until the disk has the file, and give it its name."""
        sync_file(self._file)
        self._file.close()
        finish(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self.close()
        else:
            self._file.close()
            unfinished(self._path).unlink()


class IndexedWriter(TokenWriter):
    """A writer of PREFIX.bin, as `TokenWriter` writes a file, and of PREFIX.idx, whose hash is `index_sha256`."""

    def __init__(self, prefix: Path | str, dtype: np.dtype):
        assert dtype in DTYPE_CODES.values(), dtype
        super().__init__(data_path(prefix), dtype)
        self.prefix = Path(prefix)
        self._lengths: list[np.ndarray] = []

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document.

        Args:
            tokens: Integer ids [n], n >= 1, within the range of the dtype, the end-of-text token last.
        """
        self.add_documents(tokens, [len(tokens)])

    def add_documents(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Append documents, and note their lengths for the index."""
        super().add_documents(tokens, lengths)
        self._lengths.append(np.asarray(lengths, "<i4"))

    def close(self) -> None:
        """Write the index beside the ids, and give both files their names."""
        index = index_bytes(np.concatenate([np.empty(0, "<i4"), *self._lengths]), self.dtype)
        self.index_sha256 = hashlib.sha256(index).hexdigest()
        path = index_path(self.prefix)
        with open(unfinished(path), "wb") as file:
            file.write(index)
            sync_file(file)
        super().close()
        finish(path)


class IndexedReader:
    """A reader of PREFIX.bin and PREFIX.idx, with one sequence per document.

    `reader[i]` is the ids of sequence i. Opening looks at sizes and ends only, however long the index; `check` reads
    all of it.

    Attributes:
        file: The .bin file.
        dtype: The type of the ids.
        n_tokens: The number of ids.
        lengths: The tokens of each sequence, int32, a memory map.

    Raises:
        ValueError: Either file is missing, truncated or not what its header says; the message names it.
    """

    def __init__(self, prefix: Path | str):
        index_file, data_file = index_path(prefix), data_path(prefix)
        index = _map_bytes(index_file)
        if len(index) < _HEADER.size:
            raise ValueError(
                f"{index_file}: truncated index, {len(index)} bytes are less than its {_HEADER.size}-byte header"
            )
        magic, version, code, sequences, document_index_length = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if magic != MAGIC:
            raise ValueError(f"{index_file}: not a Megatron index (starts with {magic!r}, expected {MAGIC!r})")
        if version != VERSION:
            raise ValueError(f"{index_file}: index version {version} is not supported, only {VERSION}")
        if code not in DTYPE_CODES:
            raise ValueError(
                f"{index_file}: dtype code {code} does not hold token ids; supported are 8 (uint16) and 4 (int32)"
            )
        expected = _HEADER.size + 12 * sequences + 8 * document_index_length
        if len(index) != expected:
            raise ValueError(
                f"{index_file}: truncated or damaged index, {len(index)} bytes where {sequences} sequences "
                f"need {expected}"
            )
        if document_index_length != sequences + 1:
            raise ValueError(
                f"{index_file}: {document_index_length - 1} documents of {sequences} sequences; only documents of one "
                f"sequence are supported, preprocess without --split-sentences"
            )
        self.dtype = DTYPE_CODES[code]
        self.index_file = index_file
        self.lengths = np.frombuffer(index, "<i4", sequences, _HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", sequences, _HEADER.size + 4 * sequences)
        self._document_index = np.frombuffer(index, "<i8", sequences + 1, _HEADER.size + 12 * sequences)
        end = int(self._pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        self.n_tokens = end // self.dtype.itemsize
        self.file = TokenFile(data_file, self.dtype, self.n_tokens)
        if self.file.size != end:
            raise ValueError(
                f"{data_file}: truncated or damaged, {self.file.size} bytes where its index counts "
                f"{self.n_tokens} {self.dtype.name} tokens = {end} bytes"
            )

    def check(self) -> None:
        """Read the whole index, in constant memory.

        Raises:
            ValueError: Its parts do not agree with each other.
        """
        end = 0
        for start in range(0, len(self), _CHECK_SEQUENCES):
            part = slice(start, start + _CHECK_SEQUENCES)
            ends = end + np.cumsum(self.lengths[part], dtype=np.int64) * self.dtype.itemsize
            expected = np.concatenate([[end], ends[:-1]])
            if not np.array_equal(self._pointers[part], expected) or self.lengths[part].min() < 0:
                raise ValueError(
                    f"{self.index_file}: damaged index, its pointers do not agree with its sequence lengths"
                )
            end = int(ends[-1])
            if not np.array_equal(self._document_index[start : start + len(ends)], np.arange(start, start + len(ends))):
                raise ValueError(f"{self.index_file}: damaged index, its documents are not its sequences in order")
        if self._document_index[-1] != len(self):
            raise ValueError(f"{self.index_file}: damaged index, its documents are not its sequences in order")

    def ends_within(self, start: int, stop: int) -> np.ndarray:
        """Return the positions in [start, stop) of the last tokens of documents, int64.

        The index must have been checked.
        """
        # Not np.searchsorted: these integers are not aligned, so it would copy all of them.
        first = bisect.bisect_right(self._pointers, start * self.dtype.itemsize)
        last = bisect.bisect_right(self._pointers, stop * self.dtype.itemsize)
        ends = self._pointers[first:last] // self.dtype.itemsize - 1
        return np.append(ends, stop - 1) if stop == self.n_tokens else ends

    def index_sha256(self) -> str:
        """Return the hash of the .idx file, which is read for it."""
        with open(self.index_file, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def tokens(self) -> np.ndarray:
        """All ids, flat [n_tokens], as a memory map."""
        return np.asarray(_map_bytes(self.file.path)).view(self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.file.read(int(self._pointers[i]) // self.dtype.itemsize, int(self.lengths[i]))


def _begin_writing_out(descriptor: int, start: int, count: int) -> None:
    """Make Linux start to write bytes that fsync will wait for.

    Elsewhere, or if this fails, fsync just takes longer.
    """
    if begin := getattr(ctypes.CDLL(None), "sync_file_range", None):
        begin(descriptor, ctypes.c_int64(start), ctypes.c_int64(count), ctypes.c_uint(2))  # SYNC_FILE_RANGE_WRITE


def _map_bytes(path: Path) -> np.ndarray:
    try:
        # An empty file cannot be mapped.
        return np.memmap(path, np.uint8, mode="r") if file_status(path).st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror or error}") from error
