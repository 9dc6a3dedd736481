"""Megatron-LM's indexed dataset: a `.bin` file of token ids and an `.idx` file that says where each document starts.

Layout of `.idx`, little endian, as written by Megatron-LM's `IndexedDatasetBuilder`
(megatron/core/datasets/indexed_dataset.py):

    bytes   9        b"MMIDIDX\\0\\0"
    uint64  1        version, 1
    uint8   1        dtype code of the tokens: 8 = uint16, 4 = int32 (there is no code for uint32)
    uint64  1        number of sequences, S
    uint64  1        length of the document index, D + 1
    int32   S        tokens in each sequence
    int64   S        byte offset of each sequence in `.bin`
    int64   D + 1    first sequence of each document, then S

We write one sequence per document. Files are read through a memory map, so opening costs no memory.
"""

import hashlib
import os
import struct
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPE_CODES = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
_HEADER = struct.Struct("<9sQBQQ")


def token_dtype(n_vocab: int) -> np.dtype:
    """uint16 for vocabularies of up to 65,535 ids, int32 beyond."""
    return DTYPE_CODES[8] if n_vocab <= 65_535 else DTYPE_CODES[4]


def data_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")


def index_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")


class IndexedWriter:
    """Writes PREFIX.bin while documents are added and PREFIX.idx on `close`; both are on disk (fsync) when it returns.

    After `close`: `tokens`, `documents`, and `sha256` of the .bin file.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype):
        assert dtype in DTYPE_CODES.values(), dtype
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self.tokens = 0
        self._lengths: list[int] = []
        self._hash = hashlib.sha256()
        self._file = open(data_path(prefix), "wb")  # noqa: SIM115 (closed by close or __exit__)

    @property
    def documents(self) -> int:
        return len(self._lengths)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def add_document(self, tokens: np.ndarray) -> None:
        """Appends one document. tokens: integer ids [n], n >= 1, within the range of the dtype."""
        data = np.ascontiguousarray(tokens, dtype=self.dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)

    def close(self) -> None:
        _close_durably(self._file)
        lengths = np.array(self._lengths, dtype="<i4")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        code = next(code for code, dtype in DTYPE_CODES.items() if dtype == self.dtype)
        with open(index_path(self.prefix), "wb") as file:
            file.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes() + pointers.tobytes() + np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            _close_durably(file)

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self.close()
        else:
            self._file.close()


class IndexedReader:
    """A memory map over PREFIX.bin and PREFIX.idx.

    `tokens` is the flat [n_tokens] array in the file's own dtype, `lengths` the tokens of each sequence, `reader[i]`
    the ids of sequence i. Raises ValueError, naming the file, when either file is missing, truncated or not what its
    header says.
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
        self.dtype = DTYPE_CODES[code]
        self.lengths = np.frombuffer(index, "<i4", sequences, _HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", sequences, _HEADER.size + 4 * sequences)
        self.tokens = np.asarray(_map_bytes(data_file))
        self.n_tokens = int(self.lengths.sum(dtype=np.int64))
        if len(self.tokens) != self.n_tokens * self.dtype.itemsize:
            raise ValueError(
                f"{data_file}: truncated or damaged, {len(self.tokens)} bytes where its index counts "
                f"{self.n_tokens} {self.dtype.name} tokens = {self.n_tokens * self.dtype.itemsize} bytes"
            )
        self.tokens = self.tokens.view(self.dtype)
        ends = np.cumsum(self.lengths, dtype=np.int64) * self.dtype.itemsize
        if not (np.array_equal(self._pointers[1:], ends[:-1]) and not self._pointers[:1].any()):
            raise ValueError(f"{index_file}: damaged index, its pointers do not agree with its sequence lengths")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        start = int(self._pointers[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[i])]


def _close_durably(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _map_bytes(path: Path) -> np.ndarray:
    try:
        # An empty file cannot be mapped.
        return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror or error}") from error
