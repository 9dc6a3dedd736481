"""Ranges of the parts prepared by commands of their own, on machines that share a folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline import load_tokenizer, open_source
from data_pipeline.ownership import HEARTBEAT, owned
from data_pipeline.prepare.part import Preparation, prepare_part
from data_pipeline.prepare.pipeline import prepare_range
from data_pipeline.prepare.pool import prepare_parts
from data_pipeline.prepare.rules import Rules
from tests.support.prepared import contents, run
from tests.support.ranks import ROOT


@pytest.fixture
def folder(tmp_path):
    """Seven parts with copies of documents in other parts."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(7):
        texts = [*open_source(f"synthetic:documents=60,seed={index}").documents(), "everywhere"]
        (folder / f"{index}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.mark.parametrize("most", [[], ["--max-documents", 100]])
def test_ranges_and_a_last_command_make_the_same_bytes(tmp_path, folder, capsys, most):
    options = [folder, "--tokenizer", "bytes", "--shard-tokens", 9000, *most]
    assert run(*options, "--output", tmp_path / "whole") == 0
    expected = contents(tmp_path / "whole")
    for index, workers in ((2, 1), (0, 2)):  # the second of three is never begun
        again = [*options, "--output", tmp_path / "data", "--part-range", f"{index}/3", "--workers", workers]
        assert run(*again) == 0 and not (tmp_path / "data").exists()
    assert most or "range 0/3 is done, which is 3 parts; of all 7, 5 are; when" in capsys.readouterr().out
    code, out, _ = run(*options, "--output", tmp_path / "data", capsys=capsys)
    assert code == 0 and (most or "continuing: 5 of 7 parts are done already" in out)
    assert contents(tmp_path / "data") == expected
    assert not (tmp_path / "data.preparing").exists()
    code, out, _ = run(*options, "--output", tmp_path / "data", "--part-range", "1/3", capsys=capsys)
    assert code == 0 and "already prepared" in out and not (tmp_path / "data.preparing").exists()


def test_who_works_where_is_seen_by_all(tmp_path, folder, capsys):
    """A range beside itself, and the whole beside a range in either order, are refused and harm nothing."""
    options, preparing = [folder, "--tokenizer", "bytes", "--output", tmp_path / "data"], tmp_path / "data.preparing"
    assert run(*options, "--part-range", "0/2") == 0
    finished = contents_of_parts(preparing)
    with owned(preparing / "ranges" / "0-of-2"):
        for other, what in ((["--part-range", "0/2"], "range 0/2"), ([], "a range")):
            code, _, err = run(*options, *other, capsys=capsys)
            assert code == 2 and err.count("\n") == 1
            assert f"another process is preparing {what} of this dataset (process {os.getpid()} on " in err
        assert run(*options, "--part-range", "1/2") == 0
    with owned(preparing):
        code, _, err = run(*options, "--part-range", "1/2", capsys=capsys)
        assert code == 2 and "another process is preparing this dataset (process" in err
    assert finished.items() <= contents_of_parts(preparing).items()
    assert run(*options) == 0 and not preparing.exists()


def contents_of_parts(preparing):
    return {path.name: path.read_bytes() for path in preparing.glob("*-train-*.bin")}


@pytest.mark.distributed
def test_a_killed_range_gives_way_at_once(tmp_path, folder):
    """SIGKILL of one of three that work side by side: the last command does its parts, and deletes its leftovers."""
    (tmp_path / "slow_filter.py").write_text("import time\n\ndef keep(text):\n    time.sleep(0.01)\n    return True\n")
    options = ["--filter", "slow_filter:keep", "--allow-code", tmp_path / "slow_filter.py", "--tokenizer", "bytes"]
    line = list(map(str, [sys.executable, "-m", "data_pipeline.prepare", folder, *options, "--output"]))
    ranges = [
        subprocess.Popen([*line, tmp_path / "data", "--part-range", f"{index}/3"], cwd=ROOT) for index in range(3)
    ]
    deadline = time.monotonic() + 60
    while not list((tmp_path / "data.preparing").glob(".*-train-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranges[1].send_signal(signal.SIGKILL)
    assert [process.wait(timeout=60) for process in ranges] == [0, -signal.SIGKILL, 0]
    subprocess.run([*line, tmp_path / "data"], cwd=ROOT, check=True)
    subprocess.run([*line, tmp_path / "whole", "--workers", "2"], cwd=ROOT, check=True)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert not (tmp_path / "data.preparing").exists()


def test_many_ranges_at_once_make_one_folder(tmp_path, folder):
    """Twelve that create it at the same moment."""
    barrier, failures = threading.Barrier(12), []

    def work(index):
        barrier.wait()
        try:
            sources = [open_source(str(folder))]
            said = []
            prepare_range(
                sources, tmp_path / "data", load_tokenizer("bytes"), index=index, count=12, report=said.append
            )
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(list((tmp_path / "data.preparing/ranges").iterdir())) == 12
    assert run(folder, "--tokenizer", "bytes", "--output", tmp_path / "data") == 0


def test_commands_with_other_tokenizers_do_not_mix(tmp_path, folder, monkeypatch):
    """One that begins in the same folder before the workers of another have loaded theirs."""
    monkeypatch.setattr("data_pipeline.prepare.pool._start_method", lambda: "spawn")
    assert run(folder, "--tokenizer", "bytes", "--output", tmp_path / "whole") == 0
    preparing, others = tmp_path / "data.preparing", []

    def prepare_parts_after_another(*arguments):
        if not others:
            others.append(0)
            others.append(run(folder, "--output", tmp_path / "data", "--part-range", "1/3"))
        return prepare_parts(*arguments)

    monkeypatch.setattr("data_pipeline.prepare.pipeline.prepare_parts", prepare_parts_after_another)
    options = [folder, "--tokenizer", "bytes", "--output", tmp_path / "data"]
    assert run(*options, "--part-range", "0/2", "--workers", 2) == 0 and others == [0, 0]
    assert run(*options) == 0
    assert contents(tmp_path / "data") == contents(tmp_path / "whole") and not preparing.exists()


def test_a_range_that_comes_late_prepares_nothing(tmp_path, folder, monkeypatch, capsys):
    """The whole is made between its first look and the moment in which it owns its range."""
    options = [folder, "--tokenizer", "bytes", "--output", tmp_path / "data"]

    def await_free(*_):
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "data.preparing")  # as who has finished there does
        assert run(*options) == 0

    monkeypatch.setattr("data_pipeline.prepare.workdir.await_free", await_free)
    code, out, _ = run(*options, "--part-range", "1/3", capsys=capsys)
    assert code == 0 and "already prepared" in out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("data")] == ["data"]


def test_who_comes_late_does_not_make_a_finished_folder_anew(tmp_path, folder):
    """Such as a process on a machine that was cut off: it has lost its files, and leaves nothing."""
    (part, *_) = open_source(str(folder)).parts
    (tmp_path / "data.preparing").mkdir()
    preparation = Preparation(tmp_path / "data.preparing", Rules(), load_tokenizer("bytes"))
    with pytest.raises(FileNotFoundError):
        prepare_part(part, "0" * 32, preparation, lambda *_: shutil.rmtree(preparation.folder))
    assert not preparation.folder.exists()


def test_the_folder_of_the_next_command_stays(tmp_path, folder, monkeypatch):
    """It is made anew as soon as the dataset is in its place, before the command that made it has ended."""
    preparing = tmp_path / "data.preparing"

    def next_command(*_):
        preparing.mkdir()
        for name in ("unfinished.txt", "begun"):
            (preparing / name).touch()

    monkeypatch.setattr("data_pipeline.prepare.pipeline.record_content", next_command)
    assert run(folder, "--tokenizer", "bytes", "--output", tmp_path / "data") == 0
    assert (preparing / "begun").exists() and (preparing / "unfinished.txt").exists()


def test_a_folder_that_cannot_be_removed_while_it_is_owned_goes_after_that(tmp_path, folder, monkeypatch):
    """NFS renames the lock that is removed while it is open."""
    rmdir, preparing = Path.rmdir, tmp_path / "data.preparing"

    def rmdir_of_nfs(path):
        if path == preparing and any(thread.name == HEARTBEAT for thread in threading.enumerate()):
            (path / "unfinished.txt").touch()
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", rmdir_of_nfs)
    assert run(folder, "--tokenizer", "bytes", "--output", tmp_path / "data") == 0 and not preparing.exists()


def test_what_is_not_finished_takes_no_room_for_long(tmp_path, folder, monkeypatch, capsys):
    """After a full disk, and after a kill when the range begins again; not what another range is writing."""
    options = [folder, "--tokenizer", "bytes", "--output", tmp_path / "data"]
    preparing = tmp_path / "data.preparing"

    def full(*_):
        assert list(preparing.glob(".*-train-*"))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("data_pipeline.prepare.part.BATCH_DOCUMENTS", 10)
        patched.setattr("data_pipeline.prepare.part._PartWriter.finish", full)
        patched.setattr("data_pipeline.prepare.pool._start_method", lambda: "fork")  # so that it is full there too
        for workers in (1, 2):
            code, _, err = run(*options, "--part-range", "0/2", "--workers", workers, capsys=capsys)
            assert code == 2 and "no space left" in err and not list(preparing.glob(".*-train-*"))
    assert run(*options, "--part-range", "0/2") == 0
    (mine, *_), others = sorted(preparing.glob("*.json")), "f" * 32
    for key in (mine.stem, others):
        (preparing / f".{key}-train-00000.bin.{'0' * 16}").touch()
    assert run(*options, "--part-range", "0/2") == 0
    assert [path.name[1:33] for path in preparing.glob(".*-train-*")] == [others]
    (preparing / f".{mine.stem}-train-00000.bin.{'0' * 16}").touch()
    with owned(preparing / "ranges/0-of-2"):  # another range may be at the same parts, if its sources are others
        assert run(*options, "--part-range", "1/2") == 0 and len(list(preparing.glob(".*-train-*"))) == 2


@pytest.mark.parametrize("text", ["3/3", "1", "-1/3", "1/0", "a/b", "0/3/1"])
def test_what_is_no_range(tmp_path, folder, capsys, text):
    code, _, err = run(folder, "--output", tmp_path / "data", f"--part-range={text}", capsys=capsys)
    assert code == 2 and f"--part-range {text}: must be I/N with I from 0 to N-1" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("data*"))
