"""Opening files that somebody else may have written, finding those that they name, and showing their texts."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from data_pipeline.printable import printable

MOST_BYTES = 32 << 20
"""The largest file of JSON or YAML that is read where nothing else is said."""

_KINDS = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def check_regular(path: str | Path) -> None:
    """Refuse what is no regular file, before somebody opens it: a pipe would make them wait, for ever perhaps.

    Raises:
        ValueError: It is missing, or something else than a file; the message names it.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    _require_regular(path, mode)


def read_bytes(path: str | Path, *, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file.

    Args:
        path: The file.
        most: How many bytes it may have.

    Raises:
        ValueError: It is missing, too large, or something else than a file; the message names it. The cause is the
            OSError where there was one.
    """
    try:
        # A pipe that nobody writes to is not waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(most + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)
    if len(data) > most:
        raise ValueError(f"{printable(path)} is larger than {most:,} bytes, the most that such a file may have")
    return data


def read_text(path: str | Path, *, most: int = MOST_BYTES) -> str:
    """Return the content of a regular file in UTF-8.

    Raises:
        ValueError: As `read_bytes`, or it is in another encoding.
    """
    data = read_bytes(path, most=most)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{printable(path)}: is not UTF-8: byte {error.start:,} is 0x{data[error.start]:02x}; save it as UTF-8, or "
            "restore it"
        ) from None


def file_inside(folder: str | Path, name: str) -> Path:
    """Return the regular file `name` of a folder, where neither the name nor a symbolic link may lead out of it.

    The links of Hugging Face's cache, from `snapshots/` to the `blobs/` of the same repository, lead nowhere else.

    Args:
        folder: A folder; it may itself be reached by a link.
        name: A name in it, perhaps from a file that somebody else has written.

    Raises:
        ValueError: It leads out of the folder, is missing, or something else than a file; the message names it.
    """
    folder = Path(folder)
    if not name or "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"{printable(folder)}: {printable(name)!r} is no name of a file in this folder")
    path = folder / name
    check_regular(path)
    target, home = path.resolve(), folder.resolve()
    if not any(target.is_relative_to(root) for root in (home, *_blobs(home))):
        raise ValueError(
            f"{printable(path)} is a link that leads out of its folder, to {printable(target)}; put a copy of that "
            "file in its place if it belongs there"
        )
    return path


def check_folder(folder: str | Path) -> None:
    """Check what a folder from elsewhere holds: apart from folders, nothing but regular files of its own.

    Raises:
        ValueError: A link leads out of it, or there is a pipe or the like, or no such folder; the message names it.
    """
    try:
        entries = sorted(Path(folder).iterdir())
    except (OSError, ValueError) as error:
        raise _unreadable(folder, error) from error
    for path in entries:
        if not path.is_dir():
            file_inside(folder, path.name)


def _blobs(folder: Path) -> list[Path]:
    """Return where the files of a snapshot in Hugging Face's cache are, if `folder` is in one."""
    return [
        above.parent / "blobs"
        for above in (folder, *folder.parents)
        if above.name == "snapshots" and re.match("(models|datasets|spaces)--", above.parent.name)
    ]


def _require_regular(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((words for test, words in _KINDS.items() if test(mode)), "something else")
        raise ValueError(f"{printable(path)} is {kind}, not a regular file; put a file in its place")


def _unreadable(path: str | Path, error: OSError | ValueError) -> ValueError:
    reason = (isinstance(error, OSError) and error.strerror) or error
    return ValueError(f"{printable(path)} cannot be read: {reason}")
