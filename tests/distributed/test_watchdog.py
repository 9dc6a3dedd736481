"""Runs that get nowhere: what is a stall, who is named, and that nothing is left running."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from gptoss_dist.distributed import watchdog
from gptoss_dist.distributed.heartbeat import Beat, View, laggards
from gptoss_dist.distributed.watchdog import Limits, StepClock
from gptoss_dist.tracking.tracker import read_metrics
from tests.support.ranks import command, environment, losses, run, start

LIMITS = Limits(factor=10, floor_s=300, first_step_s=1800, checkpoint_s=3600, evaluation_s=0)


@pytest.fixture
def now(monkeypatch):
    moment = [1000.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: moment[0])
    return moment


def take_steps(clock: StepClock, now: list[float], *seconds: float) -> None:
    for duration in seconds:
        clock.begin(clock.step + 1)
        now[0] += duration
        clock.end()


def test_a_limit_is_a_multiple_of_the_median_and_not_less_than_the_floor(now):
    clock = StepClock(LIMITS)
    assert clock.limit_s == 1800
    take_steps(clock, now, 500.0)  # the first, compiled
    clock.begin(2)
    assert clock.limit_s == 1800
    now[0] += 1
    clock.end()
    take_steps(clock, now, 1.0, 200.0, 1.0)  # one long collection of garbage changes no median
    assert clock.limit_s == 300
    take_steps(clock, now, *[60.0] * 10)  # a machine that others load makes the limit longer
    clock.begin(16)
    assert clock.limit_s == 600
    clock.compiles()
    assert clock.limit_s == 1800
    now[0] += 1000
    clock.end()
    assert clock.limit_s == 600


def test_what_is_no_step_has_limits_of_its_own_and_gives_the_step_a_new_one(now):
    clock = StepClock(LIMITS)
    take_steps(clock, now, 1.0, 1.0)
    turn = clock.turn
    with clock.doing("compute"):
        assert (clock.phase, clock.turn) == ("compute", turn)
    with clock.doing("checkpoint"):
        assert (clock.limit_s, clock.phase) == (3600, "checkpoint") and clock.turn > turn
    assert clock.limit_s == 300 and clock.turn == turn + 2
    with clock.doing("validation"):
        assert clock.limit_s == float("inf")


def beats(**changes: dict) -> dict[int, Beat]:
    first = Beat(0, "node1", "m", 10, "5", count=9, step=7, phase="compute", place="a.py:1 in f", overdue=True)
    all_of_them = {rank: replace(first, rank=rank, process=10 + rank) for rank in range(3)}
    return {rank: replace(beat, **changes.get(f"rank_{rank}", {})) for rank, beat in all_of_them.items()}


@pytest.mark.parametrize(
    ("changes", "silent", "stalled", "named", "why"),
    [
        ({}, [1], True, [1], "does not answer"),
        ({"rank_1": {"phase": "checkpoint", "overdue": False}}, [], False, None, None),
        ({"rank_1": {"phase": "checkpoint", "overdue": False}}, [1], True, [1], "does not answer"),
        ({"rank_2": {"phase": "data"}}, [], True, [2], "is behind"),
        ({"rank_0": {"step": 8}}, [], True, [1, 2], "are behind"),
        ({"rank_2": {"place": "b.py:2 in g"}}, [], True, [2], "is elsewhere than the others"),
        ({}, [], True, [], ""),
    ],
)
def test_who_is_waited_for(changes, silent, stalled, named, why):
    view = View(beats(**changes), frozenset(silent), watched_s=9.0)
    assert view.is_stalled() is stalled
    assert not replace(view, watched_s=1.0).is_stalled()
    if stalled:
        assert laggards(view) == ([view.beats[rank] for rank in named], why)


def test_time_in_which_the_process_did_not_run_does_not_count(tmp_path, monkeypatch):
    """A suspended job wakes up after an hour: its clock says so, the watch has seen one tick."""
    from gptoss_dist.distributed.processes import Ranks

    ticks = iter([0.0, 0.5, 1.0, 3600.0, 3600.5])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(ticks, 3601.0))
    watch = watchdog.Watchdog(Ranks(0, 0, 1, None), tmp_path, replace(LIMITS, first_step_s=60))
    left = [4]

    def wait(seconds):
        left[0] -= 1
        return left[0] < 0

    monkeypatch.setattr(watch._closed, "wait", wait)
    watch._watch()  # ends the process if it thinks that an hour has passed
    assert watch._age_s < 5


def test_a_dead_disk_hides_no_stall(tmp_path, monkeypatch):
    assert watchdog.free_name(tmp_path).name == f"{tmp_path.name}.1"

    def stat(*args, **kwargs):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "stat", stat)
    assert watchdog.free_name(tmp_path) == tmp_path


def options(settings: Path, folder: Path) -> list[str]:
    return shlex.split(
        f"--config {settings} --run.dir {folder} --train.steps 100000 --checkpoint.every 0 --validation.every 0 "
        "--distributed.step_floor 3"
    )


def wait_until(condition, process: subprocess.Popen | None = None, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.1)


def steps_done(folder: Path) -> int:
    return max(losses(folder), default=0) if (folder / "metrics.jsonl").is_file() else 0


def check_report(folder: Path, output: str, rank: int, process: int) -> Path:
    (line,) = [line for line in output.splitlines() if line.startswith("train.py: step ")]
    assert f"rank {rank} on {os.uname().nodename} (process {process}) does not answer, last in step " in line
    assert "stalled: " in line and "go on with --resume auto" in line
    assert line.removeprefix("train.py: ") in (folder / "log.txt").read_text()
    (stacks,) = (folder / "stalls").iterdir()
    assert "in train_steps" in (stacks / f"rank_{1 - rank}.txt").read_text()
    return stacks


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_and_shown_and_nothing_is_left(settings, tmp_path, launcher):
    folder = tmp_path / "stalled"
    process = subprocess.Popen(
        command("launch/train.py", *options(settings, folder), processes=2, launcher=launcher),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    wait_until(lambda: steps_done(folder) > 20, process)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "RANK" in p.environ()]
    ranks = [p for p in ranks if any(word.endswith("train.py") for word in p.cmdline()[:4])]
    ranks = {int(p.environ()["RANK"]): p for p in ranks if p.environ().get("LOCAL_RANK")}
    began = time.monotonic()
    ranks[1].send_signal(signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    stacks = check_report(folder, output, 1, ranks[1].pid)
    from_outside = (stacks / "rank_1.txt").read_text()
    assert "T (stopped)" in from_outside
    if "py-spy is not installed" not in from_outside:
        assert re.search(r"train_steps \(.*loop.py:\d+\)", from_outside), from_outside
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks.values())


@pytest.mark.slow
@pytest.mark.distributed
def test_the_rank_that_holds_the_store_is_named_too(settings, tmp_path):
    """Without torchrun rank 0's process holds the store: the others cannot ask each other any more."""
    folder = tmp_path / "stalled"
    process = start("launch/train.py", *options(settings, folder), processes=2)
    wait_until(lambda: steps_done(folder) > 20)
    process.send(signal.SIGSTOP, ranks=[0])
    wait_until(lambda: not process.is_running(0) and not process.is_running(1), seconds=90)
    done = process.wait()
    assert done.returncode != 0
    check_report(folder, done.stderr, 0, process.processes[0])


STUCK = """
import sys
import time

from gptoss_dist.engine.fsdp import FsdpEngine
from launch.train import main

update = FsdpEngine.update


def stuck(self, *args):
    if self.ranks.rank == 1 and self.updates == 9:
        while True:
            time.sleep(0.1)
    self.updates += 1
    return update(self, *args)


FsdpEngine.updates, FsdpEngine.update = 0, stuck
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.distributed
def test_a_rank_that_hangs_in_python_shows_where(settings, tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "stuck"
    script.write_text(STUCK)
    process = start(str(script), *options(settings, folder), processes=2)
    done = process.wait()
    assert done.returncode == 1, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("train.py: step 10 stalled")]) == 1
    (stacks,) = (folder / "stalls").iterdir()
    innermost = [(stacks / f"rank_{rank}.txt").read_text().splitlines()[3] for rank in (0, 1)]
    assert innermost[1].endswith("in stuck") and not innermost[0].endswith("in stuck")
    assert stacks.name == "step_00000010" and "report.txt" in [path.name for path in stacks.iterdir()]


@pytest.mark.distributed
def test_a_slow_validation_and_a_short_sleep_are_no_stall(settings, tmp_path):
    """A floor of half a second, and rank 0 is 12 seconds in a validation: the other waits for it in its next step."""
    script, folder = tmp_path / "script.py", tmp_path / "slow"
    script.write_text(
        "import sys, time\n"
        "from gptoss_dist.train.report import Report\n"
        "from launch.train import main\n"
        "shown = Report.validation\n"
        "def slow(self, step, *args):\n    time.sleep(12 * (step == 4))\n    shown(self, step, *args)\n"
        "Report.validation = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = start(
        str(script),
        *shlex.split(
            f"--config {settings} --run.dir {folder} --distributed.step_floor 0.5 --distributed.step_factor 2 "
            "--train.steps 6 --validation.every 4"
        ),
        processes=2,
    ).wait()
    assert done.returncode == 0, done.stderr
    assert not (folder / "stalls").exists() and len(losses(folder)) == 6


KILLED = """
import os
import signal
import sys

from gptoss_dist.engine.fsdp import FsdpEngine
from launch.train import main

update = FsdpEngine.update


def killed(self, *args):
    FsdpEngine.updates += 1
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and self.ranks.rank == int(sys.argv[-1]) and self.updates == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, *args)


FsdpEngine.updates, FsdpEngine.update = 0, killed
sys.exit(main(sys.argv[1:-1]))
"""


@pytest.mark.distributed
def test_torchrun_restarts_in_place_from_the_last_checkpoint(settings, tmp_path):
    """Rank 0, which holds the run's lock, is killed in step 7 of 12: losses are those of an undisturbed run.

    The command does not say --resume auto: a restart in place goes on all the same.
    """
    whole, killed, script = tmp_path / "whole", tmp_path / "killed", tmp_path / "script.py"
    script.write_text(KILLED)
    same = ["--config", str(settings), "--loss.router_jitter", "0.05", "--train.deterministic", "true"]
    run("launch/train.py", *same, "--run.dir", str(whole), processes=2)
    line = command(str(script), *same, "--run.dir", str(killed), "0", processes=2)
    at = line.index("--standalone")
    line[at:at] = ["--max-restarts", "2"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    assert [
        row
        for row in (json.loads(x) for x in (killed / "metrics.jsonl").read_text().splitlines())
        if row.get("event") == "resume" and row["step"] == 4
    ]
    assert losses(killed) == losses(whole) and sorted(losses(whole)) == list(range(1, 13))
    assert losses(killed, "loss/val") == losses(whole, "loss/val")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_restart_in_place_does_not_do_what_the_start_was_refused(settings, tmp_path):
    """A run is in the folder already: the start without --resume is refused, and its restart by torchrun too."""
    folder = tmp_path / "done"
    same = shlex.split(f"--config {settings} --run.dir {folder} --validation.every 0")
    run("launch/train.py", *same, "--train.steps", "4", processes=2)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    line = command("launch/train.py", *same, "--train.steps", "8", "--optim.lr", "0.5", processes=2)
    at = line.index("--standalone")
    line[at:at] = ["--max-restarts", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode != 0
    assert done.stderr.count("holds checkpoints already; continue with --resume auto") == 2
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert after.keys() == before.keys()
    assert [path.name for path in after if after[path] != before[path] and path.is_file()] == [".lock"]


SLOW = """
import sys
import time

from gptoss_dist.train import loop
from launch.train import main


def slow(module, inputs):
    time.sleep(0.02)


build = loop.build_engine


def with_a_slow_rank(settings, ranks, objective):
    engine = build(settings, ranks, objective)
    if ranks.rank == 1:
        engine.model.blocks[0].self_attn.register_forward_pre_hook(slow)
    return engine


loop.build_engine = with_a_slow_rank
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.distributed
def test_a_slow_rank_is_named(settings, tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "slow"
    script.write_text(SLOW)
    process = start(str(script), *options(settings, folder), "--distributed.straggler_every", "5", processes=2)
    wait_until(lambda: (folder / "log.txt").is_file() and "is slow" in (folder / "log.txt").read_text())
    (folder / "STOP").touch()
    done = process.wait()
    assert done.returncode == 0, done.stderr
    rows = [row["metrics"] for row in read_metrics(folder) if "perf/slowest_rank" in row["metrics"]]
    slow = [row for row in rows if row["perf/slowest_rank"] == 1 and row["perf/step_ms_max_over_median"] > 1.5]
    assert len(slow) >= 2  # the third may come after the last step
    (said,) = [line for line in (folder / "log.txt").read_text().splitlines() if "is slow" in line]
    assert f"rank 1 on {os.uname().nodename}" in said
