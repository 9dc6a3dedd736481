"""Files of token ids that any number of threads read at any place, and runs of tokens that go on in the next file."""

import io
import os
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_pipeline.foreign import check_regular

MAX_OPEN_FILES = 256
_recently_opened: deque = deque()


class TokenFile:
    """Token ids of one file, read at any place by system calls. Threads may share it.

    Unlike with a map, what was read does not count as memory of the process.

    Args:
        path: The file.
        dtype: Type of the ids.
        n_tokens: How many there are.
        offset: Where in the file they begin, in bytes.

    Raises:
        ValueError: The file is missing; the message names it. Reading beyond its end raises it too.
    """

    def __init__(self, path: Path | str, dtype: np.dtype, n_tokens: int, offset: int = 0):
        self.path, self.dtype, self.n_tokens, self.offset = Path(path), np.dtype(dtype), n_tokens, offset
        status = file_status(self.path)
        self.size, self._identity = status.st_size, (status.st_dev, status.st_ino)
        self._file: io.FileIO | None = None

    def read_into(self, position: int, ids: memoryview) -> None:
        """Fill `ids`, of the file's dtype, with those from byte `position` of the file on."""
        try:
            file = self._file or self._opened()  # held until the end, or another thread could have it closed
            count = os.preadv(file.fileno(), (ids,), position)
            if count == ids.nbytes:
                return
            rest = ids.cast("B")
            while len(rest := rest[count:]):
                position += count
                if not (count := os.preadv(file.fileno(), (rest,), position)):
                    raise ValueError(f"{self.path}: truncated, it ends before byte {position + len(rest)}")
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ids [count] from position `start` on, in the file's dtype."""
        out = np.empty(count, self.dtype)
        self.read_into(self.offset + start * self.dtype.itemsize, out.data)
        return out

    def _opened(self) -> io.FileIO:
        """Return the open file.

        Of all files that were opened, the latest 256 stay open; a file that nobody holds closes.
        """
        file = self._file
        if file is None:
            file = io.FileIO(self.path)
            status = os.fstat(file.fileno())
            if (status.st_dev, status.st_ino) != self._identity:
                raise ValueError(f"{self.path}: was replaced while it was in use; start again")
            self._file = file
            _recently_opened.append(weakref.ref(self))
            while len(_recently_opened) > MAX_OPEN_FILES:
                if (other := _recently_opened.popleft()()) is not None and other is not self:
                    other._file = None
        return file

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_file": None}


@dataclass(frozen=True)
class JoinedFiles:
    """A run of files, read from `files[number]` on into the next ones, and converted to the dtype asked for."""

    files: Sequence[TokenFile]
    number: int
    _file: ClassVar[None] = None  # none of its own is open: `read_parts` calls `read_into`

    def read_into(self, position: int, ids: memoryview) -> None:
        """Fill `ids`, of any dtype, with those from byte `position` of `files[number]` on."""
        left, out, number = len(ids), np.asarray(ids), self.number
        start = (position - self.files[number].offset) // self.files[number].dtype.itemsize
        while left:
            part = self.files[number].read(start, min(left, self.files[number].n_tokens - start))
            out[len(ids) - left :][: len(part)] = part
            number, start, left = number + 1, 0, left - len(part)


def read_parts(files: Sequence[TokenFile | JoinedFiles], parts: Iterable[Sequence[int]], ids: memoryview) -> list[int]:
    """Fill parts of `ids`, and return the last id of each, over which the next part may be put.

    This does what `read_into` of each file does, without a call for each part. Several threads may do so at once.

    Args:
        files: What is read, of the dtype of `ids`.
        parts: Which of `files`, byte position in it, first and one after the last place in `ids`, of each part.
        ids: Where the ids go.

    Raises:
        ValueError: A file cannot be read; the message names it.
    """
    last, preadv = [], os.preadv
    for number, position, first, end in parts:
        file, part = files[number], ids[first:end]
        opened = file._file  # held until the end, or another thread could have it closed
        try:
            whole = opened is not None and preadv(opened.fileno(), (part,), position) == part.nbytes
        except OSError:
            whole = False
        if not whole:
            file.read_into(position, part)  # opens it, and begins again or says what is wrong
        last.append(ids[end - 1])
    return last


def file_status(path: Path) -> os.stat_result:
    """Return the status of a file that has to be there.

    Raises:
        ValueError: It is not there; the message names it.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    check_regular(path)
    return status
