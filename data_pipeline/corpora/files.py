"""Input files on this machine or behind a URL (s3://, gs://, hf://, https://, through fsspec).

They are decompressed as they are read.
"""

import glob
import gzip
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import zstandard

COMPRESSIONS = (".gz", ".zst")


@dataclass(frozen=True)
class File:
    """One input file."""

    path: str
    """A local path or a URL."""
    size: int
    """Bytes, 0 when not known."""
    version: str
    """A text that changes when the content does: a time, or what the store says."""

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        path = urlsplit(self.path).path if is_url(self.path) else self.path  # without a signature, say
        return path.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending that tells the kind of the content: `.jsonl` for `a.jsonl.zst`."""
        return content_suffix(self.name)

    @property
    def is_compressed(self) -> bool:
        """Whether the file is decompressed as it is read."""
        return self.name.endswith(COMPRESSIONS)


def content_suffix(name: str) -> str:
    """Return the ending of a file's name, without that of its compression."""
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def is_url(spec: str) -> bool:
    """Return whether a source is named by a URL."""
    return "://" in spec


def find_files(spec: str, suffixes: tuple[str, ...] | None) -> list[File]:
    """Return the files that a path, directory, glob or URL names, sorted by name.

    Args:
        spec: The path, directory, glob or URL.
        suffixes: The endings of the files of a directory that are taken, compressed or not; None takes all.

    Returns:
        The files; none where nothing is there.

    Raises:
        ValueError: A URL cannot be looked at.
    """
    if is_url(spec):
        return _find_remote(spec, suffixes)
    path = Path(spec).expanduser()
    if path.is_dir():
        found = [file for file in sorted(path.rglob("*")) if file.is_file()]
        found = [file for file in found if suffixes is None or content_suffix(file.name) in suffixes]
    elif path.exists():
        found = [path]
    else:
        found = [file for file in map(Path, sorted(glob.glob(str(path), recursive=True))) if file.is_file()]
    return [local_file(file) for file in found]


def local_file(path: Path) -> File:
    """Describe a file on this machine."""
    status = os.stat(path)
    return File(str(path.absolute()), status.st_size, str(status.st_mtime_ns))


def _find_remote(spec: str, suffixes: tuple[str, ...] | None) -> list[File]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(spec)
        has_query = spec.startswith(("http://", "https://")) and "?" in spec
        if glob.has_magic(path) and not has_query:
            paths = system.glob(path)
        elif not path.endswith((suffixes or ()) + COMPRESSIONS) and system.isdir(path):
            paths = [name for name in system.find(path) if suffixes is None or content_suffix(name) in suffixes]
        else:
            paths = [path]
        found = []
        for name in sorted(paths):
            info = system.info(name)
            versions = [str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "updated") if info.get(key)]
            found.append(File(system.unstrip_protocol(name), info.get("size") or 0, "/".join(versions)))
        return found
    except Exception as error:  # each store raises its own kinds
        raise ValueError(f"source {spec.partition('?')[0]!r} cannot be looked at: {first_line(error)}") from error


def open_bytes(path: str) -> BinaryIO:
    """Open a file, to be read as it is.

    Raises:
        OSError: It cannot be opened, whatever a store raises for that.
    """
    if not is_url(path):
        return open(path, "rb", buffering=1 << 20)
    import fsspec

    try:
        return fsspec.open(path, "rb", block_size=1 << 23).open()
    except OSError:
        raise
    except Exception as error:
        raise OSError(first_line(error)) from error


def open_decompressed(path: str) -> BinaryIO:
    """Open what is in a .gz or .zst file, or the file itself."""
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.open(open_bytes(path)), 1 << 17)
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdStream(open_bytes(path)), buffer_size=1 << 17)
    return open_bytes(path)


class _ZstdStream(io.RawIOBase):
    """A reader of every frame of a .zst file.

    Unlike with zstandard's own reader, a file cut short inside a frame is an error, not an early end.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside_frame = False
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._file.read(1 << 17)
            if not self._input:
                if self._inside_frame:
                    raise EOFError("compressed file ended before the end-of-stream marker was reached")
                return 0
            self._inside_frame = True
            self._output = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._inside_frame = False
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def first_line(error: BaseException) -> str:
    """Return the kind and the first line of an error of another library, for a message of one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
