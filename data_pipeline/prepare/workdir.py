"""OUTPUT.preparing, the folder in which a dataset is made.

It outlives a kill, and goes away when the finished dataset in it is renamed to its place. One process at a time, of
those on all machines that see it, makes the dataset. Before that, any number of them may prepare a range of its parts
there, each as the owner of a folder `ranges/I-of-N`:

    who prepares a range    owns ranges/I-of-N, then looks whether somebody owns OUTPUT.preparing
    who makes the dataset   owns OUTPUT.preparing, then looks whether somebody owns one of ranges/*

So of two that begin at once, one sees the other.
"""

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.corpora.kinds import UNFINISHED_ENDING, UNFINISHED_FILE
from data_pipeline.disk import move, publish, remove_unfinished
from data_pipeline.ownership import Ownership, await_free, owned, sighting
from data_pipeline.prepare.part import finished_keys

_TEXT = "An unfinished dataset of `python -m data_pipeline.prepare`; the same command continues, and removes this.\n"


def _preparing_path(output: Path) -> Path:
    return output.with_name(output.name + UNFINISHED_ENDING)


@contextlib.contextmanager
def working_directory(output: Path, message: Callable[[str], None]) -> Iterator[tuple[Path, Ownership]]:
    """Create OUTPUT.preparing, or take it over, and own it.

    It stays when the work was not finished, unless there is nothing in it that could be taken over.

    Args:
        output: Where the dataset will be.
        message: Gets a line if a process on another machine that was at work there seems to be dead.

    Raises:
        ValueError: Another process is at work there, or the folder is somebody else's.
    """
    folder = _made(output)
    with _owned(folder, message) as ownership:
        _mark(folder)  # once more: who has just finished there removes it last
        if (folder / "replaced").exists() and not output.exists():  # killed between two renames
            move(folder / "replaced", output)
        remove_unfinished(folder)
        try:
            yield folder, ownership
        finally:
            # After the end of the work it may be the folder of the next command.
            if ownership.holds(folder) and not finished_keys(folder):
                _remove(folder)


@contextlib.contextmanager
def range_directory(
    output: Path, index: int, count: int, keys: Collection[str], message: Callable[[str], None]
) -> Iterator[Path]:
    """Create OUTPUT.preparing, or join those who work there, and own range `index` of `count`; it stays.

    Args:
        output: Where the dataset will be.
        index: The number of the range, from 0.
        count: How many there are.
        keys: Those of its parts. What killed processes have begun of them is removed, if no other range is at work.
        message: That of `working_directory`.

    Raises:
        ValueError: Another process is at work on this range or on the whole, or the folder is somebody else's.
    """
    folder = _preparing_path(output)
    own = folder / "ranges" / f"{index}-of-{count}"
    while True:
        _made(output)
        own.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                ownership = stack.enter_context(owned(own, message))
            except BlockingIOError as error:
                raise ValueError(_busy(folder, error, f"range {index}/{count} of ")) from error
            try:
                await_free(folder, message)
            except BlockingIOError as error:
                raise ValueError(_busy(folder, error)) from error
            if ownership.holds(own):  # else who has just finished there has removed it
                _mark(folder)
                # Other ranges may hold some of the same parts, if their count or their sources are others.
                if all(path == own or sighting(path) is None for path in own.parent.iterdir()):
                    remove_unfinished(folder, keys)
                yield folder
                return


def _made(output: Path) -> Path:
    folder = _preparing_path(output)
    folder.mkdir(parents=True, exist_ok=True)
    _mark(folder)
    return folder


def _mark(folder: Path) -> None:
    """Mark a folder as ours if it is new.

    Raises:
        ValueError: It holds something and has no mark.
    """
    if not (folder / UNFINISHED_FILE).exists():
        others = [path for path in folder.iterdir() if not path.name.startswith((".lock", ".owner-", "ranges"))]
        if others and not (folder / UNFINISHED_FILE).exists():
            raise ValueError(f"{folder}: is needed for unfinished work, but holds something else; move it away")
        (folder / UNFINISHED_FILE).write_text(_TEXT)


@contextlib.contextmanager
def _owned(folder: Path, message: Callable[[str], None]) -> Iterator[Ownership]:
    """Own the folder, with nobody at work on a range in it."""
    try:
        with contextlib.ExitStack() as stack:
            try:
                ownership = stack.enter_context(owned(folder, message))
            except BlockingIOError as error:
                raise ValueError(_busy(folder, error)) from error
            try:
                ranges = [*(folder / "ranges").glob("*-of-*")]
                # Each one that is dead on another machine is watched for a while.
                with ThreadPoolExecutor(min(max(len(ranges), 1), 256)) as pool:
                    list(pool.map(lambda path: await_free(path, message), ranges))
            except BlockingIOError as error:
                raise ValueError(_busy(folder, error, "a range of ")) from error
            yield ownership
    finally:
        _remove_if_empty(folder)


def _busy(folder: Path, owner: BlockingIOError, what: str = "") -> str:
    return f"{folder}: another process is preparing {what}this dataset ({owner}); wait for it, or end it"


def publish_dataset(folder: Path, final: Path, output: Path) -> None:
    """Rename the result to its place, and end the work; an older dataset there is removed after that.

    Args:
        folder: The working directory, which is removed.
        final: The result, in it.
        output: Its place.
    """
    replaced = folder / "replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        move(output, replaced)
    try:
        publish(final, output)
    except OSError:
        if replaced.exists():
            move(replaced, output)
        raise
    _remove(folder)


def remove_if_finished(output: Path, keys: set[str], message: Callable[[str], None]) -> None:
    """Remove OUTPUT.preparing if a kill just after the end left it, but not what belongs to another request.

    Args:
        output: The place of the dataset, which is complete.
        keys: The keys of all its parts.
        message: That of `working_directory`.
    """
    folder = _preparing_path(output)
    if (folder / UNFINISHED_FILE).exists() and finished_keys(folder) <= keys:
        with contextlib.suppress(OSError, ValueError), _owned(folder, message):
            if finished_keys(folder) <= keys:
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a working directory, and its mark last, so that what a kill on the way leaves is known to be ours.

    A worker of a killed run that is still at its last file may put that there meanwhile; then the mark stays too.
    """
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name.startswith(".")):  # who owns it, next to last
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != UNFINISHED_FILE:
                path.unlink(missing_ok=True)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    """Remove a working directory in which only the mark is left.

    NFS keeps the lock, which is open while the folder is owned, under another name: then this is for the time after.
    """
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {UNFINISHED_FILE}:
            (folder / UNFINISHED_FILE).unlink(missing_ok=True)
            folder.rmdir()
