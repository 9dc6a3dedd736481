"""A watch over the steps of a run: one that gets nowhere ends, and says where it was, instead of waiting for good.

A rank that hangs or is stopped holds up all others, in a native collective where no signal handler of Python runs. So
a thread in each rank looks at how long the step takes. What is too long depends on what the rank does: a step may take
a multiple of the median of the last ones, and not less than a floor; the first step, compilation, validation, samples
and checkpoints have limits of their own. Time in which the process does not run at all (a suspended laptop, a job that
its scheduler has stopped as a whole) does not count.

    rank 0   step 7, compute, 62 s of 60 s      too long
    rank 1   step 7, compute, silent            does not answer           -> a stall: rank 1 is named
    rank 2   step 7, checkpoint, 62 s of 3600 s within its limit          -> had it answered so, all would wait for it

A rank over its limit looks at the beats of all (heartbeat.py). It is a stall once no rank that answers is within its
limit. Then each rank writes its stacks, another one of the same machine those of a silent rank; one rank names those
that are waited for; and every process ends, at most `EXIT_S` later, a silent one by SIGKILL.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from gptoss_dist.distributed import launchers, stacks
from gptoss_dist.distributed.heartbeat import INTERVAL_S, SILENT_S, Beat, Heartbeat, View, laggards, next_beat, own_beat
from gptoss_dist.distributed.hosts import machine
from gptoss_dist.distributed.processes import Ranks

log = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_S = 60.0
"""A rank that has found a stall ends so many seconds later, whatever hangs while it reports."""
LOOK_S = 10.0
"""Seconds between two looks of rank 0 at the beats of all ranks, for those who watch the run."""
_TICK_S = 0.5
_STORE_TIMEOUT_S = 10.0
_REPORT_S = 25.0
"""How long ranks wait for each other's stacks, and for the report."""
_NO_LIMIT = float("inf")


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds; 0 is no limit."""

    factor: float
    """A step may take so many times the median; 0 switches the watchdog off."""
    floor_s: float
    """And not less than this."""
    first_step_s: float
    """The start, the first step, and a step in which something is compiled."""
    checkpoint_s: float
    evaluation_s: float
    """A validation, writing samples, or tasks of an evaluation."""

    def of(self, phase: str) -> float | None:
        """Return the limit of a phase that has one of its own."""
        own = {"checkpoint": self.checkpoint_s}
        own |= dict.fromkeys(("validation", "samples", "evaluation"), self.evaluation_s)
        return (own[phase] or _NO_LIMIT) if phase in own else None


class StepClock:
    """What this rank does, and how long it may take. The training thread writes it, the watch reads it."""

    def __init__(self, limits: Limits, window: int = 101) -> None:
        self._limits = limits
        self._durations: deque[float] = deque(maxlen=window)
        self._is_unusual, self._began = True, 0.0
        self.step, self.phase, self.turn = 0, "start", 0
        self.limit_s = self._first_step_s

    @property
    def _first_step_s(self) -> float:
        return self._limits.first_step_s or _NO_LIMIT

    def begin(self, step: int) -> None:
        """Note that step `step` begins."""
        self.step, self._began = step, time.monotonic()
        self._turn("data", self._of_a_step())
        self._is_unusual = self._is_unusual and not self._durations

    def end(self) -> None:
        """Note that it is done, but for what is done after some steps."""
        if not self._is_unusual:
            self._durations.append(time.monotonic() - self._began)
        self._is_unusual = False
        self._turn("results", self._of_a_step())

    def compiles(self) -> None:
        """Note that something is compiled in this step, which takes longer for that."""
        self._is_unusual = True
        self.limit_s = max(self.limit_s, self._first_step_s)

    @contextlib.contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Note what is done in this context, with a limit of its own if it has one."""
        if (own := self._limits.of(phase)) is None:
            self.phase = phase
            yield
            return
        before = (self.phase, self.limit_s)
        self._turn(phase, own)
        try:
            yield
        finally:
            self._turn(*before)

    def _of_a_step(self) -> float:
        if not self._durations:
            return self._first_step_s
        return max(self._limits.floor_s, self._limits.factor * statistics.median(self._durations))

    def _turn(self, phase: str, limit_s: float) -> None:
        # The turn comes last: who sees it also sees the limit that belongs to it.
        self.phase, self.limit_s = phase, limit_s
        self.turn += 1


@dataclass(frozen=True)
class _Stall:
    """What the ranks agree on when a step has stalled."""

    step: int
    by: int
    """The rank that reports it; -1 if they cannot agree, as the store does not answer."""
    silent: list[int]
    folder: str


class Watchdog:
    """The watch of one rank, from `start` to `close`.

    Args:
        ranks: The processes of the run.
        folder: The run's folder.
        limits: How long things may take.
    """

    def __init__(self, ranks: Ranks, folder: Path, limits: Limits) -> None:
        self._ranks, self._folder, self._limits = ranks, folder.absolute(), limits
        self.clock = StepClock(limits)
        self._beat = own_beat(ranks.rank)
        self._main = threading.main_thread().ident or 0
        self._closed = threading.Event()
        self._age_s, self._overdue, self._answered = 0.0, False, time.monotonic()
        self._next_look = 0.0
        self._notice: _Stall | None = None
        self._measured, self._compared_step = (0, 0.0), 0
        self._times: list[Beat] | None = None
        self._store: dist.Store | None = None
        if ranks.world_size > 1:
            default: Any = dist.distributed_c10d._get_default_store()  # torch's types lack `clone`
            store = default.clone()
            store.set_timeout(datetime.timedelta(seconds=_STORE_TIMEOUT_S))
            self._store = dist.PrefixStore("watchdog", store)
            self._heartbeat = Heartbeat(self._store, ranks.world_size)

    def start(self) -> None:
        """Begin to watch, in threads that end with the process."""
        for name, work, wanted in (
            ("heartbeat", self._communicate, self._store is not None),
            ("watchdog", self._watch, self._limits.factor > 0),
        ):
            if wanted:
                threading.Thread(target=work, name=name, daemon=True).start()

    def close(self) -> None:
        """End the watch."""
        self._closed.set()

    def publish_time(self, step: int, own_ms: float) -> None:
        """Let rank 0 know how long step `step` took this rank itself."""
        self._measured = (step, own_ms)
        if self._ranks.is_main:
            self._compared_step = step

    def take_times(self) -> list[Beat] | None:
        """Return the beats of all ranks with their own times, on rank 0, once for each comparison; else None."""
        times, self._times = self._times, None
        return times

    def view(self) -> View:
        """Return what is known of all ranks, this one included, without asking anybody.

        Rank 0 asks the others every `LOOK_S` seconds, and in every beat once its own step takes too long.
        """
        own = {self._ranks.rank: self._current_beat()}
        if self._store is None:
            return View(own, frozenset(), 0.0)
        known = self._heartbeat.view()
        return View(known.beats | own, known.silent, known.watched_s)

    # The thread that talks to the store ------------------------------------------------------------------------------

    def _communicate(self) -> None:
        while True:
            try:
                self._exchange()
                self._answered = time.monotonic()
            except Exception as error:  # of a store that is gone, or on a machine that cannot be reached at the moment
                log.debug("heartbeat: %s", error)
            if self._closed.wait(INTERVAL_S):
                return

    def _exchange(self) -> None:
        assert self._store is not None
        self._beat = self._current_beat()
        self._heartbeat.publish(self._beat)
        if self._notice is None and self._store.check(["stall"]):
            self._notice = _Stall(**json.loads(self._store.get("stall")))
        if 0 not in self._heartbeat.view().beats:
            self._heartbeat.look([0])  # its process often holds the store: later it may be too late to ask who it is
        if self._overdue or self._compared_step or (self._ranks.is_main and time.monotonic() >= self._next_look):
            self._next_look = time.monotonic() + LOOK_S
            self._heartbeat.look()
        if self._compared_step:
            beats = list(self._heartbeat.view().beats.values())
            if len(beats) == self._ranks.world_size and all(b.measured_step >= self._compared_step for b in beats):
                self._times, self._compared_step = beats, 0

    def _current_beat(self) -> Beat:
        step, own_ms = self._measured
        return next_beat(
            self._beat,
            step=self.clock.step,
            phase=self.clock.phase,
            place=stacks.place(self._main),
            overdue=self._overdue,
            measured_step=step,
            own_ms=own_ms,
        )

    # The thread that judges ------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        turn, overdue_s, last = -1, 0.0, time.monotonic()
        while not self._closed.wait(_TICK_S):
            now = time.monotonic()
            # What is more than a tick is time in which this process did not run, and the others perhaps not either.
            passed, suspended, last = min(now - last, 2 * _TICK_S), now - last > SILENT_S, now
            if suspended:
                self._overdue, self._answered = False, now
            if turn != self.clock.turn:
                turn, self._age_s, self._overdue = self.clock.turn, 0.0, False
            self._age_s += passed
            if self._notice is not None:
                self._end_run()
            if self._age_s <= self.clock.limit_s:
                continue
            if not self._overdue:
                overdue_s = 0.0
                if self._store is not None:
                    self._heartbeat.forget_looks()
                self._overdue = True
            overdue_s += passed
            if self._is_stalled(overdue_s):
                self._end_run()

    def _is_stalled(self, overdue_s: float) -> bool:
        if self._store is None:
            return True
        if not self._store_answers():
            return overdue_s > SILENT_S
        return self._heartbeat.view().is_stalled()

    def _store_answers(self) -> bool:
        return time.monotonic() - self._answered < _STORE_TIMEOUT_S + SILENT_S

    def _end_run(self) -> None:
        """Report the stall and end this process."""
        end = threading.Timer(EXIT_S, os._exit, [1])
        end.daemon = True
        end.start()
        try:
            _Ending(self).end()
        finally:
            os._exit(1)


def free_name(folder: Path) -> Path:
    """Return the first of NAME, NAME.1, NAME.2, ... that is not there, as far as the disk answers."""
    free, number = folder, 0
    while os.path.exists(free):  # Path.exists raises what a dead disk says
        number += 1
        free = folder.with_name(f"{folder.name}.{number}")
    return free


class _Ending:
    """The end of a run that has stalled, on one rank."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._rank, self._run_folder = watchdog._ranks.rank, watchdog._folder
        self._watchdog, self._clock, self._age_s = watchdog, watchdog.clock, watchdog._age_s
        self._store = watchdog._store if watchdog._store_answers() else None
        self._view = self._look()
        self._stall = self._agree()
        self._view = View(self._view.beats, frozenset(self._stall.silent), self._view.watched_s)
        self._stacks = Path(self._stall.folder)

    def end(self) -> None:
        """Write stacks, report, and end silent processes of this machine."""
        with contextlib.suppress(OSError):  # a full or dead disk: the run ends all the same
            self._write_own_stacks()
        self._publish(f"dumped/{self._rank}")
        mine = self._write_stacks_of_silent_ranks()
        if self._is_reporter():
            self._report()
            self._publish("reported")
        else:
            self._await(["reported"])
        for beat in mine:
            with contextlib.suppress(OSError):
                os.kill(beat.process, signal.SIGKILL)

    def _look(self) -> View:
        watchdog = self._watchdog
        if watchdog._store is None:
            return View({self._rank: watchdog._current_beat()}, frozenset(), 0.0)
        view = watchdog._heartbeat.view()
        if len(view.beats) < watchdog._ranks.world_size:
            self._ask(watchdog._heartbeat.look)
        after = watchdog._heartbeat.view()
        return View(after.beats | {self._rank: watchdog._current_beat()}, view.silent, view.watched_s)

    def _agree(self) -> _Stall:
        """Return what the first rank to find the stall says of it."""
        step = self._clock.step
        folder = free_name(self._run_folder / "stalls" / f"step_{step:08d}")
        proposed = _Stall(step, self._rank, sorted(self._view.silent - {self._rank}), str(folder))
        if self._watchdog._store is None:
            return proposed
        store = self._store
        if store is not None:
            text = json.dumps(dataclasses.asdict(proposed))
            if (agreed := self._ask(lambda: store.compare_set("stall", "", text))) is not None:
                return _Stall(**json.loads(agreed))
        # Whoever holds the store does not answer: rank 0, unless its launcher has it. All ranks go by what all know.
        first = self._view.beats.get(0)
        name = f"step_{step:08d}.{first.process if first else 'without_store'}"
        return _Stall(step, -1, [0] if self._rank else [], str(self._run_folder / "stalls" / name))

    def _ask(self, request: Callable[[], T], timeout_s: float = _STORE_TIMEOUT_S) -> T | None:
        """Return what the store answers, or None if it does not; it is not asked again then."""
        if self._store is None:
            return None
        answer: list[T] = []

        def ask() -> None:
            with contextlib.suppress(Exception):
                answer.append(request())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout_s)
        if not answer:
            self._store = None
            return None
        return answer[0]

    def _publish(self, key: str) -> None:
        store = self._store
        if store is not None:
            self._ask(lambda: store.set(key, "yes"))

    def _await(self, keys: list[str]) -> None:
        """Wait for what other ranks tell, but not for long."""
        deadline, store = time.monotonic() + _REPORT_S, self._store
        while store is not None and time.monotonic() < deadline and not self._ask(lambda: store.check(keys)):
            time.sleep(0.2)

    def _write_own_stacks(self) -> None:
        self._stacks.mkdir(parents=True, exist_ok=True)
        (self._stacks / f"rank_{self._rank}.txt").write_text(
            f"{self._watchdog._beat.name}, step {self._clock.step}, {self._clock.phase}\n\n{stacks.of_this_process()}"
        )
        if (recorded := stacks.flight_recorder()) is not None:
            (self._stacks / f"rank_{self._rank}.nccl.json").write_bytes(recorded)

    def _write_stacks_of_silent_ranks(self) -> list[Beat]:
        """Write what can be learned of the silent ranks of this machine, and return those that this rank has to end.

        The file is its writer's claim: of several living ranks of a machine one makes it, and none if the silent rank
        has made it itself.
        """
        if self._stall.by < 0:
            time.sleep(SILENT_S / 2)
        here, mine = machine(), []
        for beat in (self._view.beats[rank] for rank in self._stall.silent if rank in self._view.beats):
            if beat.machine != here or not stacks.is_alive(beat.process, beat.started):
                continue
            path = self._stacks / f"rank_{beat.rank}.txt"
            try:
                path.touch(exist_ok=False)
            except OSError:
                continue
            mine.append(beat)
            seen = f"{beat.name}, seen from outside; last in {_seen(beat)}"
            with contextlib.suppress(OSError):
                path.write_text(f"{seen}\n\n{stacks.of_another_process(beat.process)}")
            self._publish(f"dumped/{beat.rank}")
        return mine

    def _is_reporter(self) -> bool:
        if self._stall.by >= 0:
            return self._stall.by == self._rank
        try:  # on a shared file system one rank of all
            (self._stacks / "report.txt").touch(exist_ok=False)
        except OSError as error:
            return not isinstance(error, FileExistsError)
        return True

    def _report(self) -> None:
        living = {beat.machine for beat in self._view.answering()}
        self._await([f"dumped/{beat.rank}" for beat in self._view.beats.values() if beat.machine in living])
        text = self._message()
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')},000 ERROR {__name__}: {text}\n"
        # Past Python's streams and loggers, whose locks the main thread may hold.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{launchers.program()}: {text}\n".encode(errors="backslashreplace"))
        ranks = [f"{beat.name}: {_seen(beat)}\n" for _, beat in sorted(self._view.beats.items())]
        with contextlib.suppress(OSError), open(self._run_folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(line)
        with contextlib.suppress(OSError):
            (self._stacks / "report.txt").write_text(f"{text}\n\n{''.join(ranks)}")

    def _message(self) -> str:
        named, why = laggards(self._view)
        who = "; ".join(f"{beat.name} {why}, last in {_seen(beat)}" for beat in named[:4])
        if len(named) > 4:
            who += f"; and {len(named) - 4} more"
        if not named and self._view.beats:
            who = f"no rank is behind the others, this one is at {self._view.beats[self._rank].place}"
        if self._stall.by < 0 and 0 in self._stall.silent:
            who += ", and the run's store with it"
        return (
            f"step {self._stall.step} stalled: {self._clock.phase} takes {self._age_s:.0f} s, more than the "
            f"{self._clock.limit_s:.0f} s that it may; {who}; stacks are in {self._stacks}; all processes end, go on "
            "with --resume auto"
        )


def _seen(beat: Beat) -> str:
    return f"step {beat.step}, {beat.phase}, {beat.place}"
