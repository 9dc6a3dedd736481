"""A folder has one owner on any number of machines, and a dead owner's record gives way.

Another machine is a UTS and a PID namespace where root may make one, as in a container; `flock` is refused there, as on
a file system without locks. Elsewhere the name of the machine is a test's own.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from data_pipeline import ownership
from data_pipeline.disk import locked
from data_pipeline.ownership import owned
from tests.support.ranks import environment

PROGRAM = """
import errno, fcntl, sys
from pathlib import Path
from data_pipeline import ownership

ownership.HEARTBEAT_S, ownership.STALE_AFTER_S = map(float, sys.argv[1:])

def refused(*_):
    raise OSError(errno.ENOLCK, "no locks here")

fcntl.flock = refused
print("ready", flush=True)
while folder := sys.stdin.readline().strip():
    try:
        with ownership.owned(Path(folder), lambda text: print(text, flush=True)) as mine:
            print("owner", flush=True)
            sys.stdin.readline()
            lost_to = mine.lost()
        print("lost to", lost_to, flush=True)
    except BlockingIOError as owner:
        print("refused:", owner, flush=True)
"""


class Program:
    """A process that becomes the owner of the folders it is told, on another machine if that has a name."""

    def __init__(self, beat_s: float, stale_after_s: float, host: str | None = None) -> None:
        line = [sys.executable, "-c", PROGRAM, str(beat_s), str(stale_after_s)]
        if host:
            line = [*NAMESPACES, "sh", "-c", f'hostname {host}; exec "$0" "$@"', *line]
        self.host = host
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def tell(self, line: object = "") -> None:
        """Name a folder, or let go of the last one."""
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Return the next line."""
        return self.process.stdout.readline().rstrip("\n")

    def outcome(self) -> str:
        """Return the next line that says how it ended."""
        while not (said := self.answer()).startswith(("owner", "refused")):
            assert said, "the process has ended"
        return said

    def release(self) -> None:
        """Let go of the folder, which was its own all the time."""
        self.tell()
        assert self.answer() == "lost to None"


@pytest.fixture
def start():
    """A function that starts a `Program`, which is ended after the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **options) -> Program:
            program = Program(*arguments, **options)
            stack.callback(program.process.communicate)
            stack.callback(program.process.kill)
            assert program.answer() == "ready"
            return program

        yield start


NAMESPACES = ["unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]


def can_make_namespaces() -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run([*NAMESPACES, "hostname", "other"], capture_output=True).returncode == 0
    return False


@pytest.fixture
def no_locks(monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refused)


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(ownership, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(ownership, "STALE_AFTER_S", 1.0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_has_one_owner_and_says_which(tmp_path):
    for _ in range(2):  # what the first owner left behind holds nobody back
        said = pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .*, since 20")
        with owned(tmp_path), said, owned(tmp_path):
            pass
        assert names(tmp_path) == [".lock"]
    with pytest.raises(OSError, match="nowhere"), owned(tmp_path / "nowhere"):
        pass


@pytest.mark.distributed
def test_without_locks_a_living_process_keeps_its_folder_and_a_dead_one_does_not(tmp_path, no_locks, start):
    said = pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .*, since 20")
    with owned(tmp_path), said, owned(tmp_path):
        pass
    program = start(5.0, 60.0)
    program.tell(tmp_path)
    assert program.answer() == "owner"
    with pytest.raises(BlockingIOError, match=f"process {program.process.pid} on"), owned(tmp_path):
        pass
    program.process.kill()
    program.process.wait()
    assert names(tmp_path) == [".lock", ".owner-1"]
    began = time.monotonic()
    with owned(tmp_path):
        assert names(tmp_path) == [".lock", ".owner-2"]
    assert time.monotonic() - began < 2 and names(tmp_path) == [".lock"]


def test_a_process_with_the_id_of_a_dead_owner_is_another(tmp_path, no_locks):
    with owned(tmp_path):
        record = json.loads((tmp_path / ".owner-1").read_text())
    (tmp_path / ".owner-1").write_text(json.dumps(record | {"started": "1"}))
    with owned(tmp_path):
        pass


def test_an_owner_elsewhere_is_dead_when_its_record_has_not_been_touched(tmp_path, no_locks, fast, monkeypatch):
    """Its times are not compared with those of this machine: the record is from the future."""
    with owned(tmp_path):
        record = json.loads((tmp_path / ".owner-1").read_text())
    elsewhere = record | {"machine": "another", "host": "node\x1b7"}
    (tmp_path / ".owner-3").write_text(json.dumps(elsewhere))
    os.utime(tmp_path / ".owner-3", (time.time() + 1e6, time.time() + 1e6))
    messages, began = [], time.monotonic()
    with owned(tmp_path, messages.append):
        assert 1.0 <= time.monotonic() - began < 5.0
        assert names(tmp_path) == [".lock", ".owner-4"]
    (said,) = messages
    assert "belongs to process" in said and r"on node\x1b7, since" in said and "waits 1 s" in said


@pytest.mark.heavy
@pytest.mark.parametrize("content", [b"", b"{", b'{"host": 5}', b"\xff"])
def test_a_record_that_cannot_be_read_is_watched_too(tmp_path, no_locks, fast, content):
    (tmp_path / ".owner-1").write_bytes(content)
    with owned(tmp_path):
        assert names(tmp_path) == [".lock", ".owner-2"]


def test_who_slept_while_others_took_over_begins_again(tmp_path, no_locks, monkeypatch):
    """Between its judgement and its record, the place of the dead was taken, given back, and taken anew."""
    with owned(tmp_path):
        dead = json.loads((tmp_path / ".owner-1").read_text()) | {"started": "1"}
    (tmp_path / ".owner-1").write_text(json.dumps(dead))
    parent, create, tries = os.getppid(), ownership.create_exclusively, []

    def create_late(path, data):
        tries.append(path.name)
        living = dead | {"token": "another", "process": parent, "started": ownership._started(parent)}
        (tmp_path / ".owner-1").write_text(json.dumps(living))
        return create(path, data)

    monkeypatch.setattr(ownership, "create_exclusively", create_late)
    with pytest.raises(BlockingIOError, match=f"process {parent} on"), owned(tmp_path):
        pass
    assert tries == [".owner-2"] and names(tmp_path) == [".lock", ".owner-1"]


def test_an_owner_notices_that_it_was_taken_for_dead(tmp_path, no_locks, fast, monkeypatch):
    with owned(tmp_path) as mine:
        assert mine.lost() is None
        monkeypatch.setattr(ownership, "_started", lambda process: None)
        with owned(tmp_path) as its:
            monkeypatch.undo()
            assert f"process {os.getpid()} on" in mine.lost() and its.lost() is None
            deadline = time.monotonic() + 5
            while mine.lost_to is None and time.monotonic() < deadline:
                time.sleep(0.01)
        assert names(tmp_path) == [".lock"] and mine.lost()


def test_a_folder_that_is_renamed_is_not_taken_over(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with owned(folder) as mine:
        folder.rename(tmp_path / "renamed")
        assert mine.lost() is None
        folder.mkdir()
        assert mine.lost() is None


@pytest.mark.distributed
@pytest.mark.parametrize("hosts", [[None, None], ["node1", "node2"]], ids=["one machine", "two machines"])
def test_of_two_at_once_one_is_the_owner(tmp_path, hosts, start):
    """Twenty times of twenty, in a new folder and in that of a dead owner; the other says who it is."""
    if hosts[0] and not can_make_namespaces():
        pytest.skip("another machine needs namespaces, which only root can make")
    programs = [start(0.05, 0.5, host=host) for host in hosts]
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        if number % 2:
            record = {
                "host": "gone",
                "machine": "another" if hosts[0] else ownership.machine(),
                "process": 1,
                "started": "1",
                "since": "yesterday",
                "token": "t",
            }
            (folder / ".owner-1").write_text(json.dumps(record))
        for program in programs:
            program.tell(folder)
        outcomes = [program.outcome() for program in programs]
        (owner,) = [program for program, said in zip(programs, outcomes) if said == "owner"]
        (refused,) = [said for said in outcomes if said != "owner"]
        assert refused.startswith("refused: process ") and ", since 20" in refused, outcomes
        assert f" on {owner.host or platform.node()}, since" in refused, outcomes
        owner.release()
        assert names(folder) == [".lock"]


@pytest.mark.distributed
def test_an_owner_on_another_machine_that_is_suspended_or_killed_gives_way(tmp_path, start):
    """One that was suspended finds out when it goes on, and leaves the record of its successor alone."""
    if not can_make_namespaces():
        pytest.skip("another machine needs namespaces, which only root can make")
    suspended, successor = start(0.1, 1.0, host="node1"), start(0.1, 1.0, host="node2")
    suspended.tell(tmp_path)
    assert suspended.answer() == "owner"
    tasks = Path(f"/proc/{suspended.process.pid}/task/{suspended.process.pid}/children")
    inside = int(tasks.read_text().split()[0])
    os.kill(inside, signal.SIGSTOP)
    successor.tell(tmp_path)
    said = successor.answer()
    assert "belongs to process 1 on node1, since" in said and "this start waits 1 s" in said
    assert successor.answer() == "owner"
    os.kill(inside, signal.SIGCONT)
    suspended.tell()
    assert suspended.answer().startswith("lost to process 1 on node2, since")
    successor.release()
    suspended.tell(tmp_path)
    assert suspended.answer() == "owner"
    suspended.process.kill()
    suspended.process.wait()
    successor.tell(tmp_path)
    assert successor.outcome() == "owner"
    successor.release()
    assert names(tmp_path) == [".lock"]


def test_who_holds_the_lock_is_named_although_it_has_just_got_it(tmp_path):
    """`.lock` still names the one before, or nobody."""
    me = ownership.Owner("here", ownership.machine(), os.getpid(), ownership._started(os.getpid()), "now", "t")

    def record() -> None:
        (tmp_path / ".owner-1").write_bytes(msgspec.json.encode(me))

    lock = tmp_path / ".lock"
    lock.write_text("process 1 on another, since yesterday\n")
    with locked(lock):
        later = threading.Timer(0.3, record)
        later.start()
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on here, since now"), owned(tmp_path):
            pass
        later.join()
