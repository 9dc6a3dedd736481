"""Files of token ids and nothing else, as other projects keep them.

They are nanoGPT's `train.bin` (uint16), OLMo's `.npy` (which are the same under another name: numpy cannot load them),
and arrays written by `numpy.save`.

Such a file says neither its dtype nor its vocabulary. A wrong dtype gives numbers that look like tokens, so whatever
can tell is looked at: sizes, ids beyond the vocabulary, halves that are always zero.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.shards.token_files import TokenFile

DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"), "int32": np.dtype("<i4")}
_NPY_MAGIC = b"\x93NUMPY"
_PROBE_BYTES = 1 << 20
_CHUNK_TOKENS = 1 << 20


class RawReader:
    """A reader of one raw file, with the interface of `IndexedReader`.

    A document is what ends with the end-of-text token, and tokens after the last of these are a document too. A file
    that starts with numpy's magic is an array of numpy.save: its header must agree (one dimension or C order; object
    arrays, which are pickles, are refused). `lengths` reads the whole file once, in constant memory but for 8 bytes per
    document.

    Args:
        path: The file.
        dtype: uint16, uint32 or int32, little endian.
        eot_id: End-of-text token of the tokenizer that made the file.
        n_vocab: The number of ids of that tokenizer.

    Raises:
        ValueError: The file is missing, cut, or of another dtype; the message names it.
    """

    def __init__(self, path: Path | str, dtype: str, *, eot_id: int, n_vocab: int):
        path = Path(path)
        if dtype not in DTYPES:
            raise ValueError(f"{path}: dtype {dtype!r} does not hold token ids; use one of {', '.join(DTYPES)}")
        self.dtype: np.dtype = DTYPES[dtype]
        self.eot_id, self.n_vocab = eot_id, n_vocab
        if eot_id > np.iinfo(self.dtype).max:
            raise ValueError(f"{path}: {dtype} cannot hold the end-of-text id {eot_id}; use uint32 if the file does")
        size = TokenFile(path, self.dtype, 0).size
        header = npy_header(path)
        offset = 0
        if header is not None:
            offset, stored, count = header
            if stored != dtype:
                raise ValueError(f"{path}: its header says {stored}, not {dtype}; use --dtype {stored}")
            if size != offset + count * self.dtype.itemsize:
                raise ValueError(
                    f"{path}: truncated or damaged, {size} bytes where its header counts {count} {dtype} ids = "
                    f"{offset + count * self.dtype.itemsize} bytes"
                )
        if size == offset:
            raise ValueError(f"{path}: holds no tokens")
        if (size - offset) % self.dtype.itemsize:
            raise ValueError(
                f"{path}: truncated or of another dtype, its {size - offset} bytes are no whole number of {dtype} ids"
                + dtype_hint(path, offset, dtype, n_vocab)
            )
        self.n_tokens = (size - offset) // self.dtype.itemsize
        self.file = TokenFile(path, self.dtype, self.n_tokens, offset)

    def check(self) -> None:
        """Look at the first MiB.

        Raises:
            ValueError: Its ids are beyond the vocabulary, or look like those of another dtype.
        """
        tokens = self.file.read(0, min(self.n_tokens, _PROBE_BYTES // self.dtype.itemsize))
        hint = dtype_hint(self.file.path, self.file.offset, self.dtype.name, self.n_vocab)
        beyond = int(tokens.max()) if tokens.max() >= self.n_vocab else int(tokens.min())
        if not 0 <= beyond < self.n_vocab:
            raise ValueError(f"{self.file.path}: token id {beyond} is not one of {self.n_vocab} ids{hint}")
        if self.dtype.itemsize == 2 and _has_empty_halves(tokens, self.n_vocab):
            raise ValueError(f"{self.file.path}: every second id is next to nothing, as if read in halves{hint}")

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64."""
        return np.diff(self._ends, prepend=0)

    @cached_property
    def _ends(self) -> np.ndarray:
        """Position after each document, int64."""
        parts = []
        for start in range(0, self.n_tokens, _CHUNK_TOKENS):
            tokens = self.file.read(start, min(_CHUNK_TOKENS, self.n_tokens - start))
            parts.append(np.flatnonzero(tokens == self.eot_id) + (start + 1))
        ends = np.concatenate(parts)
        return ends if len(ends) and ends[-1] == self.n_tokens else np.append(ends, self.n_tokens)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> np.ndarray:
        length = int(self.lengths[i])
        return self.file.read(int(self._ends[i]) - length, length)


def npy_header(path: Path) -> tuple[int, str, int] | None:
    """Read the header of a file written by numpy.save.

    Returns:
        The bytes of the header, the name of the dtype and the number of ids; None for any other file.

    Raises:
        ValueError: The array does not hold token ids as they are read here.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
                return None
            file.seek(0)
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran_order, dtype = read_header[version](file)
            offset = file.tell()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: damaged .npy header; write the array again with numpy.save") from error
    names = {known.str: name for name, known in DTYPES.items()}
    if dtype.str not in names:
        raise ValueError(
            f"{path}: holds {dtype.str}, not little endian {', '.join(DTYPES)}; convert it with "
            f"numpy.save(..., tokens.astype('<u4'))"
        )
    if fortran_order and len(shape) > 1:
        raise ValueError(f"{path}: its {len(shape)} dimensions are stored in Fortran order; save it flat")
    return offset, names[dtype.str], int(np.prod(shape, dtype=np.int64))


def dtype_hint(path: Path, offset: int, dtype: str, n_vocab: int) -> str:
    """Return what to do about a file that makes no sense as `dtype`: "; ..." with the dtype that its first MiB fits."""
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(_PROBE_BYTES)
    size = path.stat().st_size - offset
    for name, candidate in DTYPES.items():
        if size % candidate.itemsize or len(data) < candidate.itemsize or candidate.itemsize == DTYPES[dtype].itemsize:
            continue
        tokens = np.frombuffer(data, candidate)
        empty_halves = candidate.itemsize == 2 and _has_empty_halves(tokens, n_vocab)
        if tokens.min() >= 0 and tokens.max() < n_vocab and not empty_halves:
            return f"; as {name} it would fit: use --dtype {name}"
    return "; restore the file, or name the tokenizer and the dtype that it was written with"


def _has_empty_halves(tokens: np.ndarray, n_vocab: int) -> bool:
    """Return whether 16-bit words look like halves of 32-bit ids: every second one is as small as an upper half."""
    return len(tokens) >= 16 and int(tokens[1::2].max()) <= (n_vocab - 1) >> 16
