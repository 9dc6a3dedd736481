"""A file behind a URL that is read to its end although connections break.

fsspec's files fetch a range of bytes with each request, and what of it had arrived is lost when the connection breaks.
So less is asked for after a failure, down to 64 KiB, and twice as much after eight successes:

    4 MiB broke, 1 MiB broke, 8 times 256 KiB came, 8 times 512 KiB came, 1 MiB broke, 256 KiB came, ...

Servers of web pages need not answer for ranges; then the file is one stream, which is opened again after a failure and
skipped to where it was.
"""

import contextlib
import io
from typing import Any

from data_pipeline.stores.attempts import READING, Attempts, changed_text
from data_pipeline.stores.errors import ChangedError
from data_pipeline.stores.systems import FileState, open_system, state_of

_MOST_BYTES, _LEAST_BYTES = 4 << 20, 64 << 10
"""Of one request."""
_SUCCESSES = 8
"""After so many, more is asked for."""
_SKIPPED_BYTES = 1 << 20


def open_remote(url: str, buffer_size: int = _MOST_BYTES) -> io.BufferedReader:
    """Open a file behind a URL for reading.

    Args:
        url: One that fsspec knows.
        buffer_size: Bytes that are asked for where fewer are read; larger reads are not rounded up.

    Raises:
        StoreError: It cannot be opened. Reading raises the same when the file cannot be read further, or has changed.
        ImportError: The package for the store is not installed.
    """
    return io.BufferedReader(RemoteReader(url), buffer_size)


class RemoteReader(io.RawIOBase):
    """An unbuffered reader of a file behind a URL; see `open_remote`."""

    def __init__(self, url: str):
        super().__init__()
        self._file: Any = None  # first, because an object that could not be made is closed too
        self._attempts = Attempts(url, READING)
        self._system, self._path = open_system(url)
        self._state: FileState | None = None
        self._is_stream = False
        self._position = 0
        self._most, self._came = _MOST_BYTES, 0
        self._size = self._repeat(self._open).size  # what is not there is noticed now

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True; a stream is read from its beginning where it has to be."""
        return True

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; the file is asked for it at the next read."""
        if whence == io.SEEK_END and self._size is None:
            raise io.UnsupportedOperation("the server does not say how long the file is")
        before = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size or 0}[whence]
        self._position = max(0, before + offset)
        return self._position

    def readinto(self, buffer) -> int:
        """Read what one request gives, and return how many bytes that were; 0 at the end."""
        data = self._repeat(lambda: self._read(min(len(buffer), self._most)))
        buffer[: len(data)] = data
        self._position += len(data)
        self._came += 1
        if self._came % _SUCCESSES == 0:
            self._most = min(2 * self._most, _MOST_BYTES)
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self._drop_file()
        super().close()

    def _repeat(self, action):
        self._attempts.begin()
        while True:
            try:
                result = action()
                self._attempts.succeed()
                return result
            except Exception as error:  # each store raises its own kinds
                self._drop_file()
                if isinstance(error, ValueError) and not self._is_stream and self._position and self._is_web:
                    self._is_stream = True  # so fsspec says that the server does not answer for ranges
                    continue
                self._most, self._came = max(self._most // 4, _LEAST_BYTES), 0
                self._attempts.fail(error)

    @property
    def _is_web(self) -> bool:
        protocols = self._system.protocol
        return "http" in ((protocols,) if isinstance(protocols, str) else protocols)

    def _open(self) -> FileState:
        """Open the file unless it is open, and return what the store says of it.

        Raises:
            ChangedError: It is not the one that was opened before.
        """
        if self._file is None:
            if self._state is not None:
                self._system.invalidate_cache()
            options = {"block_size": 0} if self._is_stream else {"block_size": _MOST_BYTES, "cache_type": "none"}
            file = self._system.open(self._path, "rb", **options)
            state = state_of(getattr(file, "details", None) or {})
            if not state.version:
                state = state_of(self._system.info(self._path))
            if self._state is not None and state.differs(self._state):
                raise ChangedError(changed_text())
            self._file, self._state = file, state
        assert self._state is not None
        return self._state

    def _read(self, count: int) -> bytes:
        size = self._open().size
        if not count or (size is not None and self._position >= size):
            return b""
        if self._is_stream:
            self._skip()
        elif self._file.tell() != self._position:
            self._file.seek(self._position)
        data = self._file.read(count)
        if not data and size is not None:
            raise EOFError(f"the connection ended after byte {self._position} of {size}")
        return data

    def _skip(self) -> None:
        """Read a stream to the position, from its beginning if it is beyond that already."""
        if self._file.tell() > self._position:
            self._drop_file()
            self._open()
        while (missing := self._position - self._file.tell()) > 0:
            if not self._file.read(min(missing, _SKIPPED_BYTES)):
                raise EOFError(f"the connection ended before byte {self._position}")

    def _drop_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # the connection may be what broke
                file.close()
