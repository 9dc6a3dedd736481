"""Where a command writes its result: a place on a file system, to which a finished dataset can be renamed."""

import contextlib
from pathlib import Path

from data_pipeline.corpora.files import is_remote, local_path
from data_pipeline.secrets import without_secrets


def local_output(output: str | Path) -> Path:
    """Return the path on this machine that an output is named by; `~` is the home, as in the names of sources.

    Raises:
        ValueError: It is a URL of something else, or can be no path.
    """
    if is_remote(str(output)):
        raise ValueError(
            f"output {without_secrets(str(output))}: is a URL; name a place on a file system, and copy what is written "
            f"there to the bucket afterwards"
        )
    return local_path(str(output))


def output_path(output: str | Path) -> Path:
    """Return where a dataset will really be, as an absolute path.

    Raises:
        ValueError: It is a URL, or nothing can be renamed to that place.
    """
    output = local_output(output).absolute()
    if output.is_symlink():
        with contextlib.suppress(RuntimeError):  # since Python 3.13 it stays the link
            output = output.resolve()
        if output.is_symlink():
            raise ValueError(f"{output}: is a link that leads back to itself; choose another output")
    if output.is_mount():
        raise ValueError(f"{output}: is a mount point, to which nothing can be renamed; choose a directory below it")
    return output


def new_output(output: str | Path) -> Path:
    """Return what `output_path` returns, of a dataset that does not exist yet.

    Raises:
        ValueError: As `output_path`, or something is there already.
    """
    output = output_path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output}: exists; choose another output directory")
    return output
