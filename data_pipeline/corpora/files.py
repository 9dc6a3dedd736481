"""Input files on this machine or behind a URL (s3://, gs://, hf://, https://, through fsspec).

They are decompressed as they are read.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from data_pipeline.corpora.compression import decompressed
from data_pipeline.corpora.folders import files_of
from data_pipeline.corpora.kinds import SUFFIXES, LeftOut, suffixes_of, why_left_out
from data_pipeline.secrets import without_secrets

_LOCAL = "file://"  # fsspec's name for what is on this machine


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
        return name_of(self.path)

    @property
    def suffix(self) -> str:
        """The ending that tells the kind of the content: `.jsonl` for `a.jsonl.zst`."""
        return suffixes_of(self.name)[0]

    @property
    def is_compressed(self) -> bool:
        """Whether the file is decompressed as it is read."""
        return suffixes_of(self.name)[1] != ""


@dataclass(frozen=True)
class FoundFiles:
    """What a source names on a disk or in a store."""

    files: list[File]
    """The files that are taken, sorted by name."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What was there besides."""


def name_of(path: str) -> str:
    """Return the name of a file without its folder, and of a URL without its query."""
    return (urlsplit(path).path if is_url(path) else path).rstrip("/").rpartition("/")[2]


def is_url(spec: str) -> bool:
    """Return whether a source is named by a URL."""
    return "://" in spec


def local_path(spec: str) -> Path:
    """Return the path on this machine that a source, or a folder for output, is named by.

    Raises:
        ValueError: It begins with the home of a user who has none, or can be no path.
    """
    try:
        if "\0" in spec:
            raise RuntimeError("a path has no NUL character")
        return Path(spec.removeprefix(_LOCAL)).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{spec!r}: {error}") from error


def find_files(spec: str) -> FoundFiles:
    """Return the files that a path, folder, pattern or URL names.

    A single file is taken whatever it is called. Of folders and patterns only files of known kinds are, each once.

    Raises:
        ValueError: A URL cannot be looked at, or a single file is none that could be read to its end.
    """
    if is_url(spec) and not spec.startswith(_LOCAL):
        return _find_remote(spec)
    path = local_path(spec)
    if not path.is_dir() and path.exists():
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError(f"source {spec!r}: is a pipe or a device, no file; write to a file what comes out of it")
        return FoundFiles([local_file(path)])
    paths, left_out = files_of(path)
    return FoundFiles([local_file(path) for path in paths], left_out)


def all_files(folder: Path) -> list[File]:
    """Return every file below a folder, whatever it is, sorted by name."""
    return [local_file(file) for file in sorted(folder.rglob("*")) if file.is_file()]


def local_file(path: Path) -> File:
    """Describe a file on this machine."""
    status = os.stat(path)
    return File(str(path.absolute()), status.st_size, str(status.st_mtime_ns))


def _find_remote(spec: str) -> FoundFiles:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(spec)
        paths, left_out = _remote_paths(system, path, spec)
        found = []
        for name in sorted(paths):
            info = system.info(name)
            if info.get("type") == "other":
                raise OSError("is a pipe or a device, no file; write to a file what comes out of it")
            versions = [str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "updated") if info.get(key)]
            found.append(File(system.unstrip_protocol(name), info.get("size") or 0, "/".join(versions)))
        return FoundFiles(found, left_out)
    except Exception as error:  # each store raises its own kinds
        reason = without_secrets(first_line(error))
        raise ValueError(f"source {without_secrets(spec)!r} cannot be looked at: {reason}") from None


def _remote_paths(system, path: str, spec: str) -> tuple[list[str], LeftOut]:
    import glob

    has_query = spec.startswith(("http://", "https://")) and "?" in spec
    if glob.has_magic(path) and not has_query:
        names = system.glob(path)
    elif suffixes_of(name_of(spec))[0] not in SUFFIXES and system.isdir(path):
        names = system.find(path)
    else:
        return [path], LeftOut()
    left_out, root = LeftOut(), os.path.commonpath([*names, path]) if names else path
    taken = []
    for name in names:
        # Below the folder that was asked for; what is above it may have any name.
        parts = name.removeprefix(root).strip("/").split("/")
        hidden = next((part for part in parts[:-1] if part.startswith(".")), None)
        if reason := why_left_out(hidden or parts[-1] or name_of(name)):
            left_out.add(reason)
        else:
            taken.append(name)
    return taken, left_out


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
    """Open what is in a compressed file, or the file itself."""
    return decompressed(open_bytes(path), suffixes_of(name_of(path))[1])


def first_line(error: BaseException) -> str:
    """Return the kind and the first line of an error of another library, for a message of one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
