"""OUTPUT.preparing, the folder in which a dataset is made.

It outlives a kill, and belongs to one process at a time. It goes away when the finished dataset in it is renamed to its
place.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.corpora.files import local_path
from data_pipeline.disk import locked, move, publish
from data_pipeline.prepare.part import finished_keys, remove_temporary_files

_MARK = "unfinished.txt"
_TEXT = "An unfinished dataset of `python -m data_pipeline.prepare`; the same command continues, and removes this.\n"


def output_path(output: str | Path) -> Path:
    """Return where the dataset will really be.

    Raises:
        ValueError: Nothing can be renamed to that place.
    """
    output = local_path(str(output)).absolute()
    if output.is_symlink():
        output = output.resolve()
    if output.is_mount():
        raise ValueError(f"{output}: is a mount point, to which nothing can be renamed; choose a directory below it")
    return output


def _preparing_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.preparing")


@contextlib.contextmanager
def working_directory(output: Path) -> Iterator[Path]:
    """Create OUTPUT.preparing, or take it over, and lock it while it is in use.

    It stays when the work was not finished, unless there is nothing in it that could be taken over.

    Raises:
        ValueError: Another process is at work there, or the folder is somebody else's.
    """
    folder = _preparing_path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is preparing this dataset; wait for it, or end it") from error
        if not (folder / _MARK).exists():
            if any(folder.iterdir()):
                raise ValueError(f"{folder}: is needed for unfinished work, but holds something else; move it away")
            (folder / _MARK).write_text(_TEXT)
        if (folder / "replaced").exists() and not output.exists():  # killed between two renames
            move(folder / "replaced", output)
        remove_temporary_files(folder)
        try:
            yield folder
        finally:
            if not finished_keys(folder):
                _remove(folder)


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


def remove_if_finished(output: Path, keys: set[str]) -> None:
    """Remove OUTPUT.preparing if a kill just after the end left it, but not what belongs to another request.

    Args:
        output: The place of the dataset, which is complete.
        keys: The keys of all its parts.
    """
    folder = _preparing_path(output)
    with contextlib.suppress(OSError), locked(folder):
        if (folder / _MARK).exists() and finished_keys(folder) <= keys:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a working directory, and its mark last, so that what a kill on the way leaves is known to be ours.

    A worker of a killed run that is still at its last file may put that there meanwhile; then the mark stays too.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _MARK:
                path.unlink(missing_ok=True)
        if [path.name for path in folder.iterdir()] == [_MARK]:
            (folder / _MARK).unlink()
        folder.rmdir()
