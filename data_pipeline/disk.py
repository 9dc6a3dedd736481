"""Files and folders that appear whole or not at all, survive a loss of power, and have one writer at a time.

Everything durable in the project goes through here. Two steps make something durable: its content is flushed to the
disk (`sync_file`, `sync_path`), and then a rename gives it its name, which the disk has when the folder around it is
flushed as well (`sync_path` of that folder). A reader meets the old state or the new one, never half of it.
"""

import contextlib
import fcntl
import glob
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

_held: set[int] = set()
"""File descriptors of the locks that this process holds."""
_tokens: dict[int, str] = {}
"""What is part of the hidden names of a process, which a forked one does not take over."""


def sync_file(file: IO) -> None:
    """Wait until the disk has what was written to an open file."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Wait until the disk has a file's content, or what was created and renamed in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a file and wait until the disk has it; for folders that are published as a whole."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        sync_file(file)


def write_file_atomically(path: Path, data: bytes, *, make_folder: bool = True) -> None:
    """Write a file durably; after a crash at any moment it is either as before or complete.

    Args:
        path: The file.
        data: Its content.
        make_folder: Create the folder if it is missing; else that is an error.
    """
    if make_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "xb") as file:
        file.write(data)
        sync_file(file)


def unfinished(path: Path) -> Path:
    """Return the hidden name, this process's own, under which a file is written until `finish` renames it."""
    # Its number alone is not its own: a process on another machine, or in another container, may have the same.
    token = _tokens.setdefault(os.getpid(), secrets.token_hex(8))
    return path.with_name(f".{path.name}.{token}")


def finish(path: Path) -> None:
    """Give a file that was written and flushed as `unfinished(path)` its name."""
    os.rename(unfinished(path), path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, which then replaces `path` at once; it is not flushed to the disk."""
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _beside(path: Path) -> Path:
    """Return a hidden name that nobody else has, for what is going to be `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def unfinished_files(folder: Path, names: Collection[str] = ("",)) -> set[Path]:
    """Return what writers in a folder have begun, of the files that begin with one of `names`."""
    beginnings = tuple(f".{name}" for name in names)
    return {
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.name.startswith(beginnings) and re.fullmatch(r"\..+\.[0-9a-f]{16}", path.name) and path.is_file()
    }


def remove_unfinished(folder: Path, names: Collection[str] = ("",), but: Collection[Path] = ()) -> None:
    """Remove what killed writers have left in a folder.

    Only who owns the folder may call this, or who owns all that has such a name.

    Args:
        folder: The folder.
        names: What the files begin with.
        but: Files that stay.
    """
    for path in unfinished_files(folder, names).difference(but):
        path.unlink(missing_ok=True)


def remove_own_unfinished(folder: Path, name: str) -> None:
    """Remove what this process has begun to write in a folder and will not finish: files that begin with `name`."""
    for path in folder.glob(unfinished(folder / f"{glob.escape(name)}*").name):
        path.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Give a file a second name.

    Raises:
        OSError: The file system has no hard links, or the two are on different ones.
    """
    os.link(source, target)


def create_exclusively(path: Path, data: bytes) -> bool:
    """Create a small file with its content, unless there is one: of several that try at once, one succeeds.

    That holds on file systems without locks too, between machines. A reader meets the whole content, except on a file
    system without hard links, where the file may be empty for a moment. Nothing is flushed to the disk.

    Returns:
        Whether this call created it.

    Raises:
        OSError: It cannot be written.
    """
    temporary = _beside(path)
    try:
        temporary.write_bytes(data)
        try:
            link(temporary, path)
        except FileExistsError:
            # NFS repeats a request whose answer was lost, and then meets the link that it has made.
            return temporary.stat().st_nlink == 2
        except FileNotFoundError:  # somebody who owns the folder has removed the temporary file
            return False
        except OSError:
            return _create_in_place(path, data)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _create_in_place(path: Path, data: bytes) -> bool:
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it durably where the file system has no hard links."""
    try:
        link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync_path(target)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder within a file system; a file at the target is replaced."""
    os.rename(source, target)


@contextlib.contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """Make a folder `.OUTPUT.tmp-` and 16 hexadecimal digits, which is removed at the end unless `publish` renames it.

    It is locked while in use, so that there is one writer of `output` at a time, and what killed runs left behind can
    be recognised and is removed.

    Raises:
        ValueError: Another process is writing `output`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        # One at a time looks around and takes its place: of two that start at once, one sees the other.
        with locked(output.parent, wait_s=10.0, optional=True):
            for leftover in output.parent.glob(f".{glob.escape(output.name)}.tmp-{'[0-9a-f]' * 16}"):
                _remove_leftover(leftover, output)
            staging = output.parent / f".{output.name}.tmp-{secrets.token_hex(8)}"
            staging.mkdir()
            held.callback(shutil.rmtree, staging, ignore_errors=True)
            held.enter_context(locked(staging))
        yield staging


def _remove_leftover(folder: Path, output: Path) -> None:
    try:
        with locked(folder):
            shutil.rmtree(folder)
    except BlockingIOError:
        raise ValueError(
            f"{output} is being written by another process; wait until it has ended, or choose another output"
        ) from None
    except OSError:  # no folder, or not ours: it stays
        pass


def publish(staging: Path, output: Path) -> None:
    """Rename a finished folder, whose files are on disk, to its place, which is empty or does not exist."""
    for directory in [path for path in staging.rglob("*") if path.is_dir()]:
        sync_path(directory)
    sync_path(staging)
    move(staging, output)
    sync_path(output.parent)


@contextlib.contextmanager
def locked(path: Path, wait_s: float = 0.0, *, optional: bool = False) -> Iterator[None]:
    """Hold a folder or file against other processes that lock it too.

    Args:
        path: A folder or file that exists.
        wait_s: Seconds to wait for another process.
        optional: On a file system without locks, go on without one.

    Raises:
        BlockingIOError: Another process still holds it.
        OSError: There is no such folder or file, or the file system has no locks.
    """
    # NFS locks only a file that is open for writing; a folder cannot be.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    _held.add(descriptor)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise BlockingIOError(f"another process holds {path}") from None
                time.sleep(0.1)
            except OSError:
                if not optional:
                    raise
                break
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def forget_locks() -> None:
    """Close the locks in a forked process; they belong to its parent, and end with that process."""
    while _held:
        os.close(_held.pop())


def dated_folder(parent: Path, name: str) -> Path:
    """Return a folder of `parent` that does not exist yet, called by `name` and the time."""
    name = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(path for n in range(1, 1000) if not (path := parent / (name + f"-{n}" * (n > 1))).exists())
