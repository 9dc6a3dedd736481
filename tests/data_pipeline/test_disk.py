"""Files that appear whole, folders that are published, locks between processes."""

import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys

import pytest

from data_pipeline import disk


def test_a_file_is_as_before_or_complete(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    disk.write_file_atomically(path, b"first")
    assert path.read_bytes() == b"first" and path.stat().st_mode & 0o777 == 0o644

    def full(file):
        raise OSError("no space left")

    monkeypatch.setattr(disk, "sync_file", full)
    with pytest.raises(OSError, match="no space left"):
        disk.write_file_atomically(path, b"second")
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]


def test_an_unfinished_file_is_hidden_until_it_is_finished(tmp_path):
    path = tmp_path / "train-00000.bin"
    disk.unfinished(path).write_bytes(b"x")
    assert not path.exists() and disk.unfinished(path).name.startswith(".")
    disk.finish(path)
    assert [file.name for file in tmp_path.iterdir()] == ["train-00000.bin"]


def test_a_folder_is_published_or_leaves_nothing(tmp_path):
    output = tmp_path / "data"
    with disk.staging_directory(output) as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "file").write_text("x")
        disk.publish(staging, output)
    assert (output / "inner" / "file").read_text() == "x" and list(tmp_path.iterdir()) == [output]
    with pytest.raises(RuntimeError), disk.staging_directory(tmp_path / "other") as staging:
        (staging / "file").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [output]


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path):
    left, users = tmp_path / ".data.tmp-0123456789abcdef", [tmp_path / ".data.tmp-mine", tmp_path / "data.tmp"]
    for folder in (left, *users):
        folder.mkdir()
    with disk.staging_directory(tmp_path / "data") as used, disk.staging_directory(tmp_path / "other") as other:
        said = pytest.raises(ValueError, match="data is being written by another process; wait until it has ended")
        with said, disk.staging_directory(tmp_path / "data"):
            pass
        assert used.is_dir() and other.is_dir() and not left.exists()
    assert sorted(tmp_path.iterdir()) == users


def test_the_user_decides_who_may_read_what_is_written(tmp_path):
    before = os.umask(0o027)
    try:
        disk.write_file_atomically(tmp_path / "file", b"x")
        with disk.replacing(tmp_path / "replaced") as temporary:
            temporary.write_text("x")
        with disk.staging_directory(tmp_path / "folder") as staging:
            disk.write_synced(staging / "file", "x")
            disk.publish(staging, tmp_path / "folder")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"file": 0o640, "replaced": 0o640, "folder": 0o750}


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    """os._exit in the middle of both ways to replace a file is as good as a kill."""
    for way in ("disk.write_file_atomically(path, b'x')", "disk.replacing(path).__enter__().write_text('x')"):
        end = f"""
import os; from pathlib import Path; from data_pipeline import disk
disk.os.replace = disk.sync_file = lambda *_: os._exit(3)
path = Path({str(tmp_path / "cursor.json")!r}); {way}; os._exit(3)"""
        assert subprocess.run([sys.executable, "-c", end]).returncode == 3
    (tmp_path / ".cursor.json.mine").write_text("x")
    assert len(list(tmp_path.iterdir())) == 3
    disk.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".cursor.json.mine"]


def test_a_replacement_that_fails_leaves_everything_as_it_was(tmp_path):
    """Also a file that has the name which a replacement of `plot.png` once had on the way."""
    plot, mine = tmp_path / "plot.png", tmp_path / "plot.tmp"
    plot.write_text("old")
    mine.write_text("mine")
    with pytest.raises(OSError), disk.replacing(plot) as temporary:
        temporary.write_text("half")
        raise OSError
    assert plot.read_text() == "old" and mine.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def hold(path, ready, end):
    with disk.locked(path):
        ready.set()
        end.wait(30)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_holds_other_processes_back(tmp_path, kind):
    path = tmp_path / "lock"
    path.mkdir() if kind == "folder" else path.touch()
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(path, ready, end))
    process.start()
    assert ready.wait(30)
    with pytest.raises(BlockingIOError, match="another process holds"), disk.locked(path, wait_s=0.2):
        pass
    end.set()
    with disk.locked(path, wait_s=30):  # as soon as the other is done
        pass
    process.join()


def test_a_file_is_created_once(tmp_path, monkeypatch):
    """Also where a file system has no hard links, and where NFS says that a link failed which it has made."""
    path, link = tmp_path / "record", os.link
    assert disk.create_exclusively(path, b"first") and not disk.create_exclusively(path, b"second")
    path.unlink()

    def made_twice(source, target):
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", made_twice)
    assert disk.create_exclusively(path, b"first") and path.read_bytes() == b"first"
    path.unlink()

    def refused(source, target):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refused)
    assert disk.create_exclusively(path, b"first") and not disk.create_exclusively(path, b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_a_link_or_where_there_are_none_a_copy(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_text("x")
    disk.link_or_copy(source, tmp_path / "linked")
    assert os.path.samefile(source, tmp_path / "linked")

    def refused(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(disk, "link", refused)
    disk.link_or_copy(source, tmp_path / "copied")
    assert (tmp_path / "copied").read_text() == "x" and not os.path.samefile(source, tmp_path / "copied")


def test_a_file_is_locked_where_only_writers_may_lock(tmp_path, monkeypatch):
    """As on NFS, where flock of a descriptor that only reads is refused."""
    path, flock = tmp_path / "lock", fcntl.flock
    path.touch()

    def of_nfs(descriptor, operation):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    with disk.locked(path, optional=True), pytest.raises(BlockingIOError), disk.locked(path, optional=True):
        pass
