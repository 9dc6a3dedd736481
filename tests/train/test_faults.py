import errno
import os
import signal

import pytest

from gptoss_dist.distributed.signals import STOPPING, StopRequest
from gptoss_dist.train import faults
from gptoss_dist.train.faults import FolderWatch, SkipGuard, TrainingError


@pytest.fixture
def not_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOPPING)
def test_signals_become_a_flag_and_a_second_ctrl_c_stops(number, not_under_nohup):
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    try:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
        stop.close()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("how", ["deleted", "renamed", "replaced"])
def test_a_folder_that_is_gone_is_noticed_once(tmp_path, how):
    run, checkpoints = tmp_path / "run", tmp_path / "checkpoints"
    run.mkdir(), checkpoints.mkdir()
    watch = FolderWatch([run, checkpoints], interval_s=0)
    assert not watch.look() and watch.lost is None
    if how == "deleted":
        checkpoints.rmdir()
    else:
        checkpoints.rename(tmp_path / "elsewhere")
    if how == "replaced":
        checkpoints.mkdir()
    assert watch.look() and watch.lost == checkpoints
    assert not watch.look()


@pytest.mark.parametrize(("number", "is_gone"), [(errno.ESTALE, True), (errno.EIO, False)])
def test_a_network_file_system_that_stutters_is_no_loss(tmp_path, monkeypatch, number, is_gone):
    watch = FolderWatch([tmp_path], interval_s=0)

    def stat(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(faults.os, "stat", stat)
    assert watch.look() is is_gone


def test_only_steps_in_a_row_are_fatal():
    guard = SkipGuard(limit=2, total=5)
    for step, skipped in enumerate([True, False, True, False]):
        guard.observe(step, skipped, 1.0, 1.0)
        guard.check(step, 1.0)
    assert guard.total == 7
    for step in (4, 5):
        guard.observe(step, True, float("nan"), 1.0)
    with pytest.raises(TrainingError, match=r"2 steps in a row.*step 5"):
        guard.check(5, float("nan"))
