"""Files in a run's folder by which it is asked to stop, and says how it ended."""

from __future__ import annotations

import json
import time
from pathlib import Path

from data_pipeline.disk import write_file_atomically

STOP, STOPPED, DONE = "STOP", "STOPPED", "DONE"


class StopFile:
    """The file STOP in a run's folder, looked for now and then.

    Args:
        folder: The run's folder.
        interval_s: Seconds between two looks.
    """

    def __init__(self, folder: Path, interval_s: float = 1.0) -> None:
        self._path, self._interval_s, self._next = folder / STOP, interval_s, 0.0

    def requested(self) -> bool:
        """Return whether the file was there at a look in this call."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._interval_s
        return self._path.exists()


def mark_stopped(folder: Path, step: int) -> None:
    """Say that the run left before its last step because it was asked to, and that `step` is saved."""
    (folder / STOP).unlink(missing_ok=True)
    write_file_atomically(folder / STOPPED, json.dumps({"step": step}).encode())


def mark_done(folder: Path, step: int) -> None:
    """Say that the run has reached its last step, and that it is saved."""
    (folder / STOP).unlink(missing_ok=True)
    write_file_atomically(folder / DONE, json.dumps({"step": step}).encode())


def clear(folder: Path) -> None:
    """Remove what the last start said; a request to stop stays."""
    for name in (STOPPED, DONE):
        (folder / name).unlink(missing_ok=True)
