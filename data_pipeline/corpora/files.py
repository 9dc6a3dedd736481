"""Input files on this machine or behind a URL (s3://, gs://, hf://, https://, through fsspec).

They are decompressed as they are read.
"""

import os
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from data_pipeline.corpora.compression import decompressed
from data_pipeline.corpora.folders import files_of
from data_pipeline.corpora.kinds import CHAINED, SUFFIXES, LeftOut, suffixes_of, why_left_out
from data_pipeline.printable import shown
from data_pipeline.secrets import without_secrets
from data_pipeline.stores.attempts import ONCE, READING, Patience, changed_text, repeat
from data_pipeline.stores.errors import ChangedError, StoreError, explained
from data_pipeline.stores.listing import files_below, files_matching
from data_pipeline.stores.reader import open_remote
from data_pipeline.stores.systems import FileState, check_unchanged, open_system, state_of

Record = TypeVar("Record")
_LOCAL = "file://"  # fsspec's name for what is on this machine
_WEB = ("http://", "https://")
_CHAIN = "::"  # fsspec takes it for the border of two URLs


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
    """Return the name of a file without its folder, and of a web page's address without its query."""
    # In a store's keys `?` and `#` are letters like all others.
    return (urlsplit(path).path if path.startswith(_WEB) else path).rstrip("/").rpartition("/")[2]


def is_url(spec: str) -> bool:
    """Return whether a source is named by a URL."""
    return "://" in spec


def is_remote(spec: str) -> bool:
    """Return whether a source is named by a URL of what is not on this machine."""
    return is_url(spec) and not spec.startswith(_LOCAL)


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
    if is_remote(spec):
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
    try:
        system, path = open_system(spec)
        return repeat(spec, lambda: _look(system, path, spec))
    except Exception as error:  # each store raises its own kinds
        raise ValueError(f"source {without_secrets(spec)!r} cannot be looked at: {explained(error, spec)}") from None


def _look(system: Any, path: str, spec: str) -> FoundFiles:
    system.invalidate_cache()  # it may be the second try
    infos, left_out = _remote_infos(system, path, spec)
    found = []
    for name in sorted(infos):
        info = infos[name]
        if info.get("size") is None or not state_of(info).version:  # a listing need not have them
            info = system.info(name)
        if info.get("type") == "other":
            raise ValueError("is a pipe or a device, no file; write to a file what comes out of it")
        state = state_of(info)
        found.append(File(system.unstrip_protocol(name), state.size or 0, state.version))
    return FoundFiles(found, left_out)


def _remote_infos(system: Any, path: str, spec: str) -> tuple[dict[str, dict], LeftOut]:
    """Return fsspec's descriptions of the files that are taken, by name."""
    import glob

    is_web = spec.startswith(_WEB)
    is_pattern = glob.has_magic(path) and not (is_web and "?" in spec)
    infos = files_matching(system, path) if is_pattern else {}
    if not is_pattern or (not infos and _is_there(system, path)):
        is_page = is_web and suffixes_of(name_of(spec))[0] not in SUFFIXES and system.isdir(path)
        info = {"type": "directory"} if is_page else system.info(path)
        if info["type"] != "directory":
            return {path: info}, LeftOut()
        infos = files_below(system, path)
    left_out, root = LeftOut(), os.path.commonpath([*infos, path]) if infos else path
    taken = {}
    for name, info in infos.items():
        # Below the folder that was asked for; what is above it may have any name.
        parts = name.removeprefix(root).strip("/").split("/")
        hidden = next((part for part in parts[:-1] if part.startswith(".")), None)
        if reason := why_left_out(hidden or parts[-1] or name_of(name)) or (CHAINED if _CHAIN in name else None):
            left_out.add(reason)
        else:
            taken[name] = info
    return taken, left_out


def _is_there(system: Any, path: str) -> bool:
    """Return whether something has just this name, with `[` and the like in it."""
    try:
        return system.exists(path)
    except Exception:  # who may list need not be allowed to ask for a name that no object has
        return False


def open_bytes(path: str, buffer_size: int = 4 << 20) -> BinaryIO:
    """Open a file, to be read as it is.

    Args:
        path: A local path or a URL.
        buffer_size: Bytes that are asked of a store where fewer are read.

    Raises:
        OSError: It cannot be opened.
    """
    if not is_url(path):
        return open(path, "rb", buffering=1 << 20)
    try:
        return open_remote(path, buffer_size)
    except ImportError as error:
        raise StoreError(explained(error, path)) from error


def open_decompressed(path: str) -> BinaryIO:
    """Open what is in a compressed file, or the file itself."""
    return decompressed(open_bytes(path), suffixes_of(name_of(path))[1])


def read_unchanged(files: list[File], read: Callable[[], Iterator[Record]]) -> Iterator[Record]:
    """Yield what `read` does, and check that the files are what they were when they were found.

    They are checked after it, and those of this machine also before it: where several machines work on one corpus, a
    path may lead to another file than on the machine that has found it.

    Raises:
        ValueError: They are not, or reading failed.
        OSError: A file of this machine is not there.
    """
    for file in files:
        if not is_url(file.path):
            _check_unchanged(file)
    try:
        yield from read()
    except ValueError as error:
        if not isinstance(error.__cause__, StoreError):
            _check_unchanged_instead(files)
        raise
    for file in files:
        _check_unchanged(file)


def _check_unchanged_instead(files: list[File]) -> None:
    """Raise that a file was changed in place of another error: half of each of two files look like a damaged one."""
    for file in files:
        try:
            _check_unchanged(file, ONCE)
        except ValueError as changed:
            if isinstance(changed.__cause__, ChangedError):
                raise
            return
        except OSError:
            return


def _check_unchanged(file: File, patience: Patience = READING) -> None:
    """Check that a file is what it was when it was found.

    Raises:
        ValueError: It is another one, or its store cannot be asked; the cause is the StoreError.
        OSError: It is on this machine, and not there any more.
    """
    try:
        if is_url(file.path):
            check_unchanged(file.path, FileState(file.size or None, file.version), patience)
        elif local_file(Path(file.path)) != file:
            raise ChangedError(changed_text(here=socket.gethostname()))
    except StoreError as error:
        raise ValueError(f"{shown(file.path)}: {error}") from error
