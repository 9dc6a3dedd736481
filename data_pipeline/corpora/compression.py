"""Compressed files are decompressed as they are read, and never to more than a file of their size would hold."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import zstandard

COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading a damaged file raises."""

# Text shrinks to a third or a tenth, text that repeats itself to a hundredth. 113 KiB of a .zst can become 3 GB.
MOST_EXPANSION = 200
_EXPANDS_FREELY = 256 << 20  # bytes

_CUT_SHORT = "compressed file ended before the end-of-stream marker was reached"

# Of so many compressed bytes zstandard makes at most 64 MiB at once: 4 bytes can stand for 128 KiB.
_ZSTD_INPUT = 2048
_ZSTD_WINDOW = 1 << 31  # what `zstd --ultra --long=31` writes


def decompressed(file: BinaryIO, suffix: str) -> io.BufferedReader:
    """Return a reader of what is in an open file whose name ends in `suffix`, one of COMPRESSIONS or any other."""
    if suffix not in COMPRESSIONS:
        return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, 1 << 20)  # type: ignore[arg-type]
    if suffix == ".gz":
        stream: io.BufferedIOBase | io.RawIOBase = gzip.GzipFile(fileobj=file)
    elif suffix == ".xz":
        stream = _Members(file, lzma.LZMADecompressor)
    elif suffix == ".bz2":
        stream = _Members(file, bz2.BZ2Decompressor)
    else:
        stream = _ZstdStream(file)
    return io.BufferedReader(_Limited(file, stream), 1 << 17)


class _Limited(io.RawIOBase):
    """A reader of a stream that ends with an error where more comes out than could be meant."""

    def __init__(self, file: BinaryIO, stream: io.BufferedIOBase | io.RawIOBase):
        self._file, self._stream, self._given = file, stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._stream.readinto(buffer) or 0
        self._given += count
        if self._given > max(_EXPANDS_FREELY, MOST_EXPANSION * self._file.tell()):
            raise OSError(
                f"becomes more than {MOST_EXPANSION} times as large as it is, as a compression bomb does; decompress "
                f"it yourself if that is meant"
            )
        return count

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()


class _Members(io.RawIOBase):
    """A reader of every member of an .xz or .bz2 file.

    Unlike with Python's own readers, what follows a member and is no other one is an error, not the end.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Any]):
        self._file, self._new = file, new
        self._member: Any = None
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            if self._member is None:
                if not self._find_member():
                    return 0
                self._member = self._new()
            if self._member.needs_input and not self._input:
                self._input = self._file.read(1 << 17)
                if not self._input:
                    raise EOFError(_CUT_SHORT)
            data = self._member.decompress(self._input, len(buffer))
            self._input = b""
            if self._member.eof:
                self._member, self._input = None, self._member.unused_data
            if data:
                buffer[: len(data)] = data
                return len(data)

    def _find_member(self) -> bool:
        """Go to where the next member begins, if there is one: those of .xz may be padded with zeros."""
        self._input = self._input.lstrip(b"\0")
        while not self._input and (more := self._file.read(1 << 17)):
            self._input = more.lstrip(b"\0")
        return bool(self._input)


class _ZstdStream(io.RawIOBase):
    """A reader of every frame of a .zst file.

    Unlike with zstandard's own reader, a file cut short inside a frame is an error, not an early end.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame = self._decompressor.decompressobj()
        self._inside_frame = False
        self._block = memoryview(b"")
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            if not self._block:
                self._block = memoryview(self._file.read(1 << 17))
            if not self._block:
                if self._inside_frame:
                    raise EOFError(_CUT_SHORT)
                return 0
            part = self._block[:_ZSTD_INPUT]
            self._inside_frame = True
            self._output = memoryview(self._frame.decompress(part))
            used = len(part)
            if self._frame.eof:
                used -= len(self._frame.unused_data)
                self._frame = self._decompressor.decompressobj()
                self._inside_frame = False
            self._block = self._block[used:]
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count
