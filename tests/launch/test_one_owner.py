"""A run's folder has one owner: a second start is refused in one line, and a dead owner leaves nothing locked."""

import contextlib
import os
import shlex
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
    options = shlex.split(
        f"--config {settings} --run.dir {folder} --train.steps 100000 --checkpoint.every 0 --validation.every 0"
    )
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


ELSEWHERE = """
import errno, fcntl, os, sys

from data_pipeline import ownership
from launch.train import main

def refused(*_):
    raise OSError(errno.ENOLCK, "no locks here")

fcntl.flock = refused
ownership.HEARTBEAT_S, ownership.STALE_AFTER_S = 0.5, 5.0
ownership.machine = ownership.platform.node = lambda: os.environ["HOST"]
sys.exit(main(sys.argv[1:]))
"""
"""A run on a host of any name, on a file system without locks."""


@pytest.fixture
def start_on(settings, tmp_path):
    """A function that starts the same endless run on a host; what still runs is killed after the test."""
    script, started = tmp_path / "script.py", []
    script.write_text(ELSEWHERE)

    def start_on(host: str):
        options = shlex.split(
            f"--config {settings} --run.dir {tmp_path / 'run'} --resume auto --train.steps 100000 "
            "--validation.every 0 --checkpoint.every 2"
        )
        started.append(start(str(script), *options, HOST=host))
        return started[-1]

    yield start_on
    for each in started:
        each.send(signal.SIGKILL)


def steps(folder) -> int:
    return max(losses(folder), default=0) if (folder / "metrics.jsonl").is_file() else 0


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [["node1", "node1"], ["node1", "node2"]], ids=["one host", "two hosts"])
def test_of_two_starts_at_once_one_trains_each_time(start_on, tmp_path, hosts):
    """Twenty times of twenty, without locks. Each time the owner is killed, and one of the next two goes on."""
    for _ in range(20):
        before, both = steps(tmp_path / "run"), [start_on(host) for host in hosts]
        wait_for(lambda both=both: not all(each.is_running() for each in both))
        refused, owner = sorted(both, key=lambda each: each.is_running())
        done, host = refused.wait(), hosts[both.index(owner)]
        said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        # On a machine with much to do, half a second may be too short for a sign of life, and it says that it waits.
        assert all("there is no sign of life" in line for line in said[:-1]), said
        assert f"is in use by process {owner.processes[0]} on {host}, since" in said[-1], done.stderr
        wait_for(lambda before=before: steps(tmp_path / "run") > before + 2)
        owner.send(signal.SIGKILL)
        owner.wait()


def test_a_run_that_was_suspended_and_taken_over_saves_nothing_more(start_on, tmp_path):
    folder, first = tmp_path / "run", start_on("node1")
    wait_for(lambda: steps(folder) > 4)
    first.send(signal.SIGSTOP)
    before, second = steps(folder), start_on("node2")
    wait_for(lambda: steps(folder) > before + 4)
    first.send(signal.SIGCONT)
    ended = first.wait()
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    taken = f"{folder} was taken over by process {second.processes[0]} on node2, since"
    assert taken in ended.stderr.splitlines()[-1] and "saves nothing more" in ended.stderr
    before = steps(folder)
    wait_for(lambda: steps(folder) > before + 4)
    second.send(signal.SIGTERM)
    ended = second.wait()
    # What the first was writing has the name of what the second writes: that may fail once, and is tried again.
    assert ended.returncode == 0 and "training goes on without it" not in ended.stderr, ended.stderr
    assert int(checkpoints(folder / "checkpoints")[-1].name[5:]) == steps(folder)
    waited = f"belongs to process {first.processes[0]} on node1, since"
    assert waited in ended.stderr and "there is no sign of life; this start waits" in ended.stderr
