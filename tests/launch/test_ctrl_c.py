"""Ctrl-C before there is something to save, and a second one, end in one line and code 130."""

import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.ranks import command, environment, losses, start

pytestmark = pytest.mark.distributed

SLOW_STEPS = """
import sys
import time

from gptoss_dist.engine.fsdp import FsdpEngine
from launch.train import main

update = FsdpEngine.update
FsdpEngine.update = lambda self, *args: (time.sleep(0.5), update(self, *args))[1]
sys.exit(main(sys.argv[1:]))
"""


def test_a_second_ctrl_c_ends_at_once_in_one_line(settings, tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(SLOW_STEPS)
    process = start(str(script), *shlex.split(f"--config {settings} --run.dir {folder} --validation.every 0"))
    deadline = time.time() + 120
    while not ((folder / "metrics.jsonl").is_file() and losses(folder)):
        assert time.time() < deadline and process.is_running()
        time.sleep(0.05)
    for _ in range(2):
        process.send(signal.SIGINT)
        time.sleep(0.1)
    done = process.wait()
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1] == "train.py: interrupted; what was saved before stays"


def test_ctrl_c_before_there_is_a_run_ends_in_one_line(settings, tmp_path):
    line = command("launch/train.py", "--config", str(settings), "--run.dir", str(tmp_path / "run"))
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment())
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():  # it imports
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "train.py: interrupted; what was saved before stays\n")
