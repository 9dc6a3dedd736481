"""One process at a time works in a folder, also where several machines share it and the file system has no locks.

Two things keep others out. `flock` of `.lock` is let go by the system when a process ends, however that ends; but on
some shared file systems it fails, or holds between the processes of one machine only. So the owner also has a record,
`.owner-1`, which says who it is, and touches it every few seconds. A process that wants the folder judges each record:

    same machine                            dead as soon as its process is gone
    another machine, record is touched      alive
    another machine, record stays as it is  dead after `STALE_AFTER_S`, by the clock of the process that watches it

Times of two machines are never compared. Only if all records are dead, it creates one of the next number, which can be
created once, and looks around:

    A and B find .owner-1, dead      both try to create .owner-2: A does, B looks again and finds A alive
    A finds .owner-1 and .owner-2    that is what it had judged, and its own: A removes .owner-1 and is the owner
    A also finds .owner-3            somebody was faster, while A slept: A removes .owner-2 and begins again

Of two that create records of different numbers, the second sees that of the first. So no two are owners, but for one
case that no lock prevents: an owner that was suspended for long is taken for dead, and wakes up. Its own record is gone
then, which `Ownership.lost` tells before it writes anything that counts.
"""

import contextlib
import errno
import json
import os
import platform
import random
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from data_pipeline.disk import create_exclusively, locked
from data_pipeline.foreign import convert, parse_json
from data_pipeline.printable import printable

HEARTBEAT = "owner's heartbeat"
"""The name of the thread that does it."""
HEARTBEAT_S = 5.0
"""Seconds between two touches of a record."""
STALE_AFTER_S = 60.0
"""Seconds without a touch after which an owner on another machine is dead."""
_NAMED_WITHIN_S = 2.0
_RECORD = re.compile(r"\.owner-\d{1,9}")
_MOST_BYTES = 4096


class Owner(msgspec.Struct, frozen=True):
    """A process that owns a folder, as its record says."""

    host: str
    machine: str
    """What two processes have in common if each can tell whether the other lives."""
    process: int
    started: str
    """When the process started, as the system writes it: its id may be another process's later."""
    since: str
    """When it took the folder, for people."""
    token: str
    """What no other record has."""

    def __str__(self) -> str:
        return printable(f"process {self.process} on {self.host}, since {self.since}")


def machine() -> str:
    """Return the boot of this machine and the namespace of process ids, which a container has for itself."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _this_process() -> Owner:
    process = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return Owner(platform.node(), machine(), process, _started(process) or "", since, secrets.token_hex(8))


def _started(process: int) -> str | None:
    """Return when a process started, in clock ticks since boot, or None if it has ended."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class _Record:
    """A record as it was found."""

    path: Path
    owner: Owner | None
    """None where it cannot be read: it is written at this moment, or damaged."""
    identity: str
    """What no other record has."""
    touched: int

    def __str__(self) -> str:
        return str(self.owner or "another process")


def _look(path: Path) -> _Record | None:
    """Read a record, or return None if it is gone.

    Opening it asks the server of a network file system, which a look at its time alone might not.
    """
    try:
        with open(path, "rb") as file:
            status, content = os.fstat(file.fileno()), file.read(_MOST_BYTES)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # the latter is NFS's, of what another machine removed
            return None
        raise
    try:
        owner = convert(parse_json(content.decode(), path), Owner, str(path))
    except ValueError:
        owner = None
    return _Record(path, owner, owner.token if owner else f"inode {status.st_ino}", status.st_mtime_ns)


def _records(folder: Path) -> list[_Record]:
    """Read all records of a folder, by their numbers."""
    paths = sorted((path for path in folder.iterdir() if _RECORD.fullmatch(path.name)), key=_number)
    return [record for record in map(_look, paths) if record is not None]


def _number(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


class Ownership:
    """A folder that this process owns, until `release`."""

    def __init__(self, folder: Path, path: Path, owner: Owner) -> None:
        """Start to touch the record.

        Args:
            folder: The folder.
            path: The record in it.
            owner: What it says.
        """
        self._folder, self._path, self._owner = folder, path, owner
        self._place = _place(folder)
        self._ended, self._one_at_a_time = threading.Event(), threading.Lock()
        self.lost_to: str | None = None
        """Who has taken the folder over, as far as `lost` has found out. A thread calls it every few seconds."""
        self._thread = threading.Thread(target=self._beat, name=HEARTBEAT, daemon=True)
        self._thread.start()

    def lost(self) -> str | None:
        """Look whether the folder is still this process's, and touch the record if it is.

        Returns:
            None if it is, or if that cannot be told at the moment; else who has taken it over. A folder that was
            deleted or renamed has not been taken over by anybody.
        """
        with self._one_at_a_time, contextlib.suppress(OSError):
            if self.lost_to is None and not self._touch() and _place(self._folder) == self._place:
                others = _records(self._folder)
                self.lost_to = str(others[-1]) if others else "a process that has ended since"
        return self.lost_to

    def holds(self, folder: Path) -> bool:
        """Return whether what is at the path of a folder is still the one that this process owns."""
        with contextlib.suppress(OSError):
            found = _look(folder / self._path.name)
            return found is not None and found.identity == self._owner.token
        return False

    def release(self) -> None:
        """Let others have the folder."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if (found := _look(self._path)) and found.identity == self._owner.token:
                self._path.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            self.lost()

    def _touch(self) -> bool:
        """Touch the record; return False if it is gone."""
        found = _look(self._path)
        if found is None or found.identity != self._owner.token:
            return False
        os.utime(self._path)
        return True


def _place(folder: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def owned(folder: Path, message: Callable[[str], None] = lambda text: None) -> Iterator[Ownership]:
    """Be the one process that works in a folder.

    Its file `.lock` says who works there or did so last, and stays.

    Args:
        folder: A folder that exists.
        message: Gets a line if a process on another machine seems to be dead, and how long that is going to be watched.

    Raises:
        BlockingIOError: Another process does; the message is that process, its machine and since when.
        OSError: The folder is not there, or cannot be written.
    """
    lock = folder / ".lock"
    lock.touch()
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(lock, optional=True))
        except BlockingIOError:
            raise BlockingIOError(_holder(lock)) from None
        me = _this_process()
        path = _claim(folder, me, message)
        lock.write_text(f"{me}\n")
        ownership = Ownership(folder, path, me)
        try:
            yield ownership
        finally:
            ownership.release()


def _holder(lock: Path) -> str:
    """Name the process that holds the lock. It gets the lock before it has written who it is: it may take a moment.

    On another machine it is named by `.lock` alone, which may still name the one before.
    """
    deadline = time.monotonic() + _NAMED_WITHIN_S
    while time.monotonic() < deadline:
        for owner in (record.owner for record in _records(lock.parent)):
            if owner and owner.machine == machine() and _started(owner.process) == owner.started:
                return str(owner)
        time.sleep(0.05)
    return printable(lock.read_text().strip()) or "another process"


def _claim(folder: Path, me: Owner, message: Callable[[str], None]) -> Path:
    """Create the record of this process, once all others are dead; return its path.

    Raises:
        BlockingIOError: Another process lives.
    """
    while True:
        dead = _records(folder)
        for record in dead:
            _await_death(record, me, message)
        number = _number(dead[-1].path) + 1 if dead else 1
        path = folder / f".owner-{number}"
        if create_exclusively(path, json.dumps(msgspec.structs.asdict(me)).encode()):
            judged = {(record.path, record.identity) for record in dead}
            others = {(record.path, record.identity) for record in _records(folder) if record.path != path}
            if others <= judged:
                for record in dead:
                    record.path.unlink(missing_ok=True)
                return path
            path.unlink(missing_ok=True)
            time.sleep(random.uniform(0.0, 0.2))


@dataclass(frozen=True)
class Sighting:
    """A process that owns a folder, or did so until it died, as its record says at this moment."""

    name: str
    """The process, its machine and since when."""
    is_alive: bool | None
    """None if it is on another machine, where only `touched` tells."""
    touched: float
    """When its record was last touched, in seconds since 1970 by the clock of the file system."""


def sighting(folder: Path) -> Sighting | None:
    """Look who owns a folder, without a lock and without writing anything; None if nobody has a record there.

    Raises:
        OSError: The folder cannot be read.
    """
    records = _records(folder)
    if not records:
        return None
    found = records[-1]
    is_here = found.owner is not None and found.owner.machine == machine()
    alive = _started(found.owner.process) == found.owner.started if found.owner and is_here else None
    return Sighting(str(found), alive, found.touched / 1e9)


def await_free(folder: Path, message: Callable[[str], None] = lambda text: None) -> None:
    """Return once no process owns a folder, which stays free for others to take.

    Args:
        folder: A folder, or where one may be.
        message: As for `owned`.

    Raises:
        BlockingIOError: A process owns it; the message is that process, its machine and since when.
    """
    me = _this_process()
    for record in _records(folder) if folder.is_dir() else []:
        _await_death(record, me, message)


def _await_death(record: _Record, me: Owner, message: Callable[[str], None]) -> None:
    """Return when the owner of a record is known to be dead.

    Raises:
        BlockingIOError: It lives.
    """
    owner = record.owner
    if owner and owner.machine == me.machine:
        if _started(owner.process) == owner.started:
            raise BlockingIOError(str(owner))
        return
    began, announced = time.monotonic(), False
    while True:
        time.sleep(HEARTBEAT_S / 5)
        # The clock before the record: if this process is suspended in between, it has not watched all the time.
        waited_s, found = time.monotonic() - began, _look(record.path)
        if found is None:  # released, or taken over: the caller looks again
            return
        if (found.identity, found.touched) != (record.identity, record.touched):
            raise BlockingIOError(str(found))
        if waited_s >= STALE_AFTER_S:
            return
        if waited_s > 2 * HEARTBEAT_S and not announced:
            announced = True
            message(
                f"{record.path.parent} belongs to {record}, of which there is no sign of life; this start waits "
                f"{STALE_AFTER_S - waited_s:.0f} s for one, and then takes the folder over"
            )
