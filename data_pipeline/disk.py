"""Files and folders that appear whole or not at all, survive a loss of power, and have one writer at a time."""

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_held: set[int] = set()


def write_file_atomically(path: Path, data: bytes) -> None:
    """After a crash at any moment `path` is either as before or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """.OUTPUT.tmp-*, removed at the end unless `publish` renamed it. It is locked while in use, so that what killed
    runs left behind can be told and swept.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    for leftover in output.parent.glob(f".{glob.escape(output.name)}.tmp-*"):
        with contextlib.suppress(OSError), locked(leftover):
            shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.tmp-"))
    try:
        staging.chmod(0o755)
        with locked(staging):
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def new_output(output: str | Path) -> Path:
    """`output` as an absolute path. Raises ValueError when something is there already."""
    output = Path(output).absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output}: exists; choose another output directory")
    return output


def publish(staging: Path, output: Path) -> None:
    """Renames a finished directory, whose files are on disk, to its place, which is empty or does not exist."""
    for directory in [path for path in staging.rglob("*") if path.is_dir()]:
        sync_directory(directory)
    sync_directory(staging)
    os.rename(staging, output)
    sync_directory(output.parent)


def sync_directory(directory: Path) -> None:
    """What was created or renamed in `directory` is still there after a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Raises BlockingIOError when another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def forget_locks() -> None:
    """For a forked process: the locks are its parent's, and end with that one."""
    while _held:
        os.close(_held.pop())
