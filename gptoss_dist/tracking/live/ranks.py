"""Where each rank of a run is, in `tracking/ranks.json`: written by rank 0 every few seconds, read by whoever watches.

    {"time": 1730000000.0, "ranks": [{"rank": 0, "host": "n1", "step": 7, "phase": "compute", ...}, ...]}

Rank 0 hears the beats of all ranks anyway (distributed/heartbeat.py). A thread of its own writes them down, so that
neither training nor the heartbeat ever waits for a disk. The file is replaced at once, and not flushed to the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from data_pipeline.disk import replacing
from data_pipeline.foreign import read_json

RANKS_FILE = "tracking/ranks.json"
WRITE_S = 5.0
"""Seconds between two times that the file is written."""
STALE_S = 30.0
"""A file that is older than this says nothing of now."""


@dataclass(frozen=True)
class RankState:
    """What one rank does."""

    rank: int
    host: str
    step: int
    """The optimizer step that it is in, from 1."""
    phase: str
    """What it does in it, such as `compute`."""
    place: str = ""
    """The line of code that its main thread is in."""
    is_behind: bool = False
    """Whether it is not yet where others were a while ago; a beat that is some seconds old is not enough for that."""
    is_silent: bool = False
    """Whether it has given no sign of life between two looks at it."""
    measured_step: int = 0
    """The step in which its own work was last measured; 0 is none."""
    own_ms: float = 0.0
    """How long that took, waiting for others left out, in milliseconds."""


class RanksReport(msgspec.Struct, frozen=True):
    """The file's content."""

    time: float
    """When it was written, in seconds since 1970 by the clock of rank 0's machine."""
    ranks: list[RankState]

    def lag(self, state: RankState) -> float | None:
        """Return a rank's own time over the median of all, of the last measurement that all have; None without one."""
        times = sorted(other.own_ms for other in self.ranks if other.own_ms > 0)
        if len(times) < max(2, len(self.ranks)) or state.own_ms <= 0:
            return None
        return state.own_ms / times[(len(times) - 1) // 2]  # the lower of two in the middle, as stragglers.py takes it

    def notable(self, most: int) -> list[RankState]:
        """Return at most `most` ranks: those that are silent, behind or slow first, then the others by number."""
        if len(self.ranks) <= most:
            return self.ranks
        order = sorted(self.ranks, key=lambda s: (not s.is_silent, not s.is_behind, -(self.lag(s) or 0.0), s.rank))
        return order[:most]


class RanksRecorder:
    """A thread of rank 0 that writes the file until `close`.

    Args:
        run_dir: Folder of the run. Nothing is written where its folder `tracking` is missing.
        look: Returns what the ranks do; called in the thread.
    """

    def __init__(self, run_dir: Path, look: Callable[[], Sequence[RankState]]) -> None:
        self._path, self._look = run_dir.absolute() / RANKS_FILE, look
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ranks-recorder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, without waiting for a disk that hangs."""
        self._closed.set()
        self._thread.join(1.0)

    def _work(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # a full disk, a folder that is gone: nobody may notice in training
                self._write()
            if self._closed.wait(WRITE_S):
                return

    def _write(self) -> None:
        content = {"time": time.time(), "ranks": [dataclasses.asdict(state) for state in self._look()]}
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


def read_ranks(run_dir: Path) -> RanksReport | None:
    """Return what the ranks of a run last did, or None if that is not written or not readable."""
    try:
        return read_json(run_dir / RANKS_FILE, RanksReport, finite=True)
    except ValueError:
        return None
