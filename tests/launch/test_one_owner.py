"""A run's folder has one owner: a second start is refused in one line, and a dead owner leaves nothing locked."""

import contextlib
import os
import signal
import subprocess
import time

import pytest

from data_pipeline.disk import locked
from gptoss_dist.checkpoint import checkpoints
from tests.support.ranks import command, environment, losses, run, start

pytestmark = pytest.mark.distributed


def wait_for(condition) -> None:
    deadline = time.time() + 240
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def test_a_live_run_keeps_its_folder(settings, tmp_path):
    """Started anew, resumed, resumed on two processes, and beside its checkpoints: refused while the owner lives."""
    folder, elsewhere = tmp_path / "run", tmp_path / "checkpoints"
    options = ["--config", str(settings), "--checkpoint.dir", str(elsewhere), "--checkpoint.keep", "3"]
    here = ["--run.dir", str(folder)]
    owner = start("launch/train.py", *options, *here, "--train.steps", "100000", "--validation.every", "0")
    try:
        wait_for(lambda: len(checkpoints(elsewhere)) > 1)
        for where, arguments, processes in (
            (folder, here, 1),
            (folder, [*here, "--resume", "auto"], 2),
            (elsewhere, ["--run.dir", str(tmp_path / "other"), "--resume", "auto"], 1),
        ):
            done = run("launch/train.py", *options, *arguments, processes=processes, expect=2)
            said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
            assert len(said) == 1 and f"{where} is in use by process {owner.processes[0]} on " in said[0], done.stderr
            assert "Traceback" not in done.stderr and not (tmp_path / "other").exists()
        assert owner.is_running() and not list(elsewhere.glob("*.superseded"))
    finally:
        owner.send(signal.SIGKILL)
        owner.wait()
    last = max(losses(folder))
    again = [*options, *here, "--resume", "auto", "--train.steps", str(last + 4), "--validation.every", "0"]
    run("launch/train.py", *again)
    assert sorted(losses(folder)) == list(range(1, last + 5))


@pytest.mark.parametrize(
    "launcher, number",
    [("torchrun", signal.SIGKILL), pytest.param("deepspeed", signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_processes_save_and_end_when_their_launcher_is_killed(settings, tmp_path, launcher, number):
    folder = tmp_path / "run"
    options = ["--config", str(settings), "--run.dir", str(folder), "--train.steps", "100000", "--checkpoint.every",
               "0", "--validation.every", "0"]  # fmt: skip
    line = command("launch/train.py", *options, processes=2, launcher=launcher)
    with (tmp_path / "stderr").open("w") as stderr:
        owner = subprocess.Popen(line, env=environment(), stderr=stderr, start_new_session=True)
    try:
        wait_for(lambda: (folder / "metrics.jsonl").is_file() and len(losses(folder)) > 3)
        owner.send_signal(number)
        owner.wait()
        with locked(folder / ".lock", wait_s=120):
            pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(owner.pid, signal.SIGKILL)
    said = (tmp_path / "stderr").read_text()
    assert said.count(f"the launcher of this run has ended (process {owner.pid}); stopping too") == 1, said
    assert "Traceback" not in said
    (saved,) = checkpoints(folder / "checkpoints")
    assert int(saved.name[5:]) == max(losses(folder))


def test_of_two_starts_at_once_one_trains(settings, tmp_path):
    folder = tmp_path / "run"
    options = ["--config", str(settings), "--run.dir", str(folder), "--resume", "auto", "--checkpoint.every", "2"]
    starts = [start("launch/train.py", *options, "--run.seed", str(seed)) for seed in (1, 2)]
    ended = [started.wait() for started in starts]
    codes = [done.returncode for done in ended]
    assert sorted(codes) == [0, 2], [done.stderr for done in ended]
    refused = ended[codes.index(2)].stderr
    assert "in use by process" in refused or "another start has written checkpoints" in refused
    assert sorted(losses(folder)) == list(range(1, 13))
    seed = codes.index(0) + 1
    assert f"seed: {seed}\n" in (folder / "config.yaml").read_text() and os.path.exists(folder / ".lock")
