"""What goes wrong during a run, and what ends it because of that."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message is for the user, and checkpoints are intact."""


class FolderWatch:
    """A watch over folders that a run writes to, which somebody may delete or rename while it trains."""

    def __init__(self, folders: Iterable[Path], interval_s: float = 5.0) -> None:
        self._inodes = {folder: _inode(folder) for folder in folders}
        self._interval_s, self._next = interval_s, 0.0
        self.lost: Path | None = None
        """The folder that is gone, once one is."""

    def look(self) -> bool:
        """Return whether a folder is found to be gone; True once at most, and no more often than the interval asks."""
        if self.lost is not None or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._interval_s
        with contextlib.suppress(OSError):
            self.lost = next((folder for folder, inode in self._inodes.items() if _inode(folder) != inode), None)
        return self.lost is not None


def _inode(folder: Path) -> tuple[int, int] | None:
    """Return what identifies a folder, or None if it is gone.

    Raises:
        OSError: That cannot be told at the moment.
    """
    try:
        status = os.stat(folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):  # the last is NFS's, of what others deleted
            return None
        raise
    return status.st_dev, status.st_ino


class SkipGuard:
    """A count of the steps whose update was skipped, which ends the run after too many in a row."""

    def __init__(self, limit: int, total: int = 0) -> None:
        self.limit, self.total, self.in_a_row = limit, total, 0

    def observe(self, step: int, skipped: bool, loss: float, grad_norm: float) -> None:
        """Note the outcome of a step."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        if skipped:
            log.warning("step %d skipped: loss %s, gradient norm %s", step, loss, grad_norm)

    def check(self, step: int, loss: float) -> None:
        """Raise TrainingError after `limit` skipped steps in a row.

        Args:
            step: The last step, for the message.
            loss: Its loss, for the message.

        Raises:
            TrainingError: The last `limit` steps were all skipped.
        """
        if self.in_a_row >= self.limit:
            raise TrainingError(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient (last: step {step}, loss {loss}); "
                "the last checkpoint is intact: lower optim.lr, or inspect the data"
            )
