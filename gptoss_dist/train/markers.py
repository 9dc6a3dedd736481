"""Files in a run's folder by which scripts and people talk with a run that they did not start, and it with them.

    STOP       anybody makes it: the run finishes its step, saves and leaves with exit code 0
    STOPPED    the run has left before its last step because it was asked to: JSON with `step` and `reason`
    DONE       the run has done its last step: JSON with `step`

A launcher's exit code does not say which of these it was: torchrun ends with 1 after a signal, though all was saved.
The files are on the disk before the process ends, and a new start removes STOPPED and DONE. STOP stays until
it is answered. Rank 0 alone reads and writes them.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from data_pipeline.disk import write_file_atomically

STOP, STOPPED, DONE = "STOP", "STOPPED", "DONE"


class StopFile:
    """A look now and then at whether somebody has put a file `STOP` into a run's folder."""

    def __init__(self, folder: Path, interval_s: float = 1.0) -> None:
        self._path, self._interval_s = folder / STOP, interval_s
        self._found, self._next = False, 0.0

    def requested(self) -> bool:
        """Return whether the file has been seen; the disk is asked no more often than the interval says."""
        if not self._found and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._interval_s
            self._found = os.path.exists(self._path)  # Path.exists raises what a disk that stutters says
        return self._found


def mark_stopped(folder: Path, step: int, reason: str = "asked to stop") -> None:
    """Write durably that the run has left after step `step`, whose checkpoint is complete; the request is answered.

    Args:
        folder: The run's folder.
        step: The last optimizer step that was done.
        reason: Who asked, in words.
    """
    _write(folder / STOPPED, {"step": step, "reason": reason})
    (folder / STOP).unlink(missing_ok=True)


def mark_done(folder: Path, step: int) -> None:
    """Write durably that the run has done its last step, `step`; a request to stop has nothing to stop any more."""
    _write(folder / DONE, {"step": step})
    (folder / STOP).unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove what earlier starts have said; a request to stop stays, as it may have come while this one started."""
    for name in (STOPPED, DONE):
        (folder / name).unlink(missing_ok=True)


def _write(path: Path, values: dict[str, int | str]) -> None:
    write_file_atomically(path, (json.dumps(values) + "\n").encode())
