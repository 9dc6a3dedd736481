"""The files STOP, STOPPED and DONE, by which scripts talk with a run."""

import errno
import json
import os
import shlex
import signal
import time

import pytest

from gptoss_dist.checkpoint import checkpoints
from gptoss_dist.train.markers import StopFile, clear, mark_done, mark_stopped
from tests.support.ranks import losses, run, start


def test_the_disk_is_asked_no_more_often_than_the_interval_says(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopFile(tmp_path, interval_s=1.0)
    assert not stop.requested()
    (tmp_path / "STOP").touch()
    now[0] += 0.9
    assert not stop.requested()
    now[0] += 0.2
    assert stop.requested()
    (tmp_path / "STOP").unlink()
    assert stop.requested()  # once asked, a run stops


def test_a_disk_that_stutters_asks_for_no_stop(tmp_path, monkeypatch):
    def stat(*args, **kwargs):
        raise OSError(errno.EIO, "input/output error")

    stop = StopFile(tmp_path, interval_s=0.0)
    (tmp_path / "STOP").touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        assert not stop.requested()
    assert stop.requested()


def test_markers_answer_the_request_and_a_start_keeps_it(tmp_path):
    (tmp_path / "STOP").touch()
    mark_stopped(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["STOPPED"]
    assert json.loads((tmp_path / "STOPPED").read_text()) == {"step": 7, "reason": "asked to stop"}
    mark_done(tmp_path, 9)
    assert json.loads((tmp_path / "DONE").read_text()) == {"step": 9}
    (tmp_path / "STOP").touch()
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["STOP"]  # it may have come while this start was on its way


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["file", pytest.param("signal", marks=pytest.mark.slow)])
def test_a_run_of_two_ranks_stops_as_asked_goes_on_and_is_done(settings, tmp_path, how):
    folder = tmp_path / "asked"
    options = shlex.split(
        f"--config {settings} --run.dir {folder} --checkpoint.every 0 --validation.every 0 --resume auto"
    )
    process = start("launch/train.py", *options, "--train.steps", "100000", processes=2)
    deadline = time.monotonic() + 120
    while not ((folder / "metrics.jsonl").is_file() and len(losses(folder)) > 3):
        assert time.monotonic() < deadline and process.is_running()
        time.sleep(0.1)
    if how == "file":
        (folder / "STOP").touch()
    else:
        process.send(signal.SIGUSR2, ranks=[0])
    done = process.wait()
    assert done.returncode == 0, done.stderr
    stopped = json.loads((folder / "STOPPED").read_text())
    assert stopped["step"] == max(losses(folder)) and not (folder / "STOP").exists()
    assert stopped["reason"] == {"file": "a file STOP in the run's folder", "signal": "signal SIGUSR2"}[how]
    (saved,) = checkpoints(folder / "checkpoints")
    assert int(saved.name[5:]) == stopped["step"]

    last = stopped["step"] + 100
    if how == "file":
        (folder / "STOP").touch()  # it came while the run was starting
        run("launch/train.py", *options, "--train.steps", str(last), processes=2)
        assert json.loads((folder / "STOPPED").read_text())["step"] < last and not (folder / "STOP").exists()
    run("launch/train.py", *options, "--train.steps", str(last), processes=2)
    assert json.loads((folder / "DONE").read_text()) == {"step": last}
    assert not (folder / "STOPPED").exists() and not (folder / "STOP").exists()
