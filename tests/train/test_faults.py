import os
import signal

import pytest

from gptoss_dist.distributed.signals import StopRequest
from gptoss_dist.train.faults import SkipGuard, TrainingError


def test_signals_become_a_flag_and_a_second_ctrl_c_stops():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopRequest()
    try:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGTERM) == before


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
