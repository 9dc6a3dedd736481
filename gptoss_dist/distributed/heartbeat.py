"""What each rank tells the others without being asked: where it is, every few seconds, in the run's store.

It is a thread's work. Training neither waits for it nor shares its connection with it: a store serves one request of a
connection at a time, and the process group may wait in one for minutes.

Clocks of machines are not compared. A rank is silent if its count has not grown while the one who asks, by his own
clock, looked at it for `SILENT_S`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch.distributed as dist

from gptoss_dist.distributed.hosts import machine, this_host
from gptoss_dist.distributed.launcher_watch import started

INTERVAL_S = 2.0
"""Seconds between two beats of a rank."""
SILENT_S = 8.0
"""A rank whose beats stay away for so long does not answer."""
PHASES = ("start", "data", "compute", "optimizer", "results", "validation", "checkpoint", "samples")
"""What a rank does in a step, in this order."""


@dataclass(frozen=True)
class Beat:
    """What a rank reports of itself."""

    rank: int
    host: str
    machine: str
    """Processes with equal values can look at each other, and end each other."""
    process: int
    started: str
    count: int = 0
    step: int = 0
    """The optimizer step that it is in, from 1."""
    phase: str = "start"
    place: str = ""
    """The line of code that its main thread is in."""
    overdue: bool = False
    """Whether that takes longer than it may."""
    measured_step: int = 0
    """The step of its last measurement of its own time; 0 is none."""
    own_ms: float = 0.0
    """That time, in milliseconds."""

    @property
    def name(self) -> str:
        """How messages name the rank."""
        return f"rank {self.rank} on {self.host} (process {self.process})"

    @property
    def position(self) -> tuple[int, int]:
        """How far it is, to compare with others."""
        return self.step, PHASES.index(self.phase) if self.phase in PHASES else 0


def own_beat(rank: int) -> Beat:
    """Return the first beat of this process."""
    process = os.getpid()
    return Beat(rank, this_host(), machine(), process, started(process) or "")


class Heartbeat:
    """The beats of all ranks, in a store of their own.

    Args:
        store: A connection that nobody else uses.
        world_size: The number of ranks.
    """

    def __init__(self, store: dist.Store, world_size: int) -> None:
        self._store, self._world_size = store, world_size
        self._seen: dict[int, Beat] = {}
        self._since: dict[int, float] = {}  # when the count was last seen to grow
        self._first_look: float | None = None
        self._lock = threading.Lock()

    def publish(self, beat: Beat) -> None:
        """Tell the others."""
        self._store.set(f"beat/{beat.rank}", json.dumps(dataclasses.asdict(beat)))

    def look(self, ranks: Iterable[int] | None = None) -> None:
        """Read the beats of all ranks, or of some, once."""
        keys = {rank: f"beat/{rank}" for rank in (range(self._world_size) if ranks is None else ranks)}
        # One that has never reported has no key, for which the store would wait.
        there = keys
        if not self._store.check(list(keys.values())):
            there = {rank: key for rank, key in keys.items() if self._store.check([key])}
        values = self._store.multi_get(list(there.values())) if there else []
        now = time.monotonic()
        with self._lock:
            if ranks is None and self._first_look is None:
                self._first_look = now
            for rank, value in zip(there, values):
                beat = Beat(**json.loads(value))
                if rank not in self._seen or beat.count != self._seen[rank].count:
                    self._since[rank] = now
                self._seen[rank] = beat

    def forget_looks(self) -> None:
        """Begin to watch anew: what was seen before is too old to tell who is silent."""
        with self._lock:
            self._first_look = None
            self._since.clear()

    def view(self) -> View:
        """Return what is known now."""
        with self._lock:
            now = time.monotonic()
            watched = 0.0 if self._first_look is None else now - self._first_look
            silent = {
                rank
                for rank in range(self._world_size)
                if now - self._since.get(rank, now - watched) >= SILENT_S and watched >= SILENT_S
            }
            return View(dict(self._seen), frozenset(silent), watched)


@dataclass(frozen=True)
class View:
    """What one rank knows of all."""

    beats: dict[int, Beat]
    silent: frozenset[int]
    """Ranks that do not answer; known after `SILENT_S` of looking."""
    watched_s: float

    def answering(self) -> list[Beat]:
        """Return the beats of the ranks that answer."""
        return [beat for rank, beat in sorted(self.beats.items()) if rank not in self.silent]

    def is_stalled(self) -> bool:
        """Return whether no rank that answers is within its limit: nobody gets on, so nobody will."""
        return self.watched_s >= SILENT_S and all(beat.overdue for beat in self.answering())


def laggards(view: View) -> tuple[list[Beat], str]:
    """Return the ranks for which the others wait, as far as that can be told, and in words why it is these.

    Silent ranks; else those that are behind; else those whose main thread is elsewhere than that of most.
    """
    if silent := [view.beats[rank] for rank in sorted(view.silent) if rank in view.beats]:
        return silent, "does not answer" if len(silent) == 1 else "do not answer"
    beats = view.answering()
    first = min((beat.position for beat in beats), default=(0, 0))
    behind = [beat for beat in beats if beat.position == first]
    if 0 < len(behind) < len(beats):
        return behind, "is behind" if len(behind) == 1 else "are behind"
    places = [beat.place for beat in beats]
    odd = [beat for beat in beats if 2 * places.count(beat.place) < len(places)]
    if len(odd) == len(beats) or not odd:
        return [], ""
    return odd, "is elsewhere than the others" if len(odd) == 1 else "are elsewhere than the others"


def next_beat(beat: Beat, **changes: object) -> Beat:
    """Return the beat after `beat`, with some values changed."""
    return dataclasses.replace(beat, count=beat.count + 1, **changes)  # type: ignore[arg-type]
