"""Watching a run from outside: what its folder says at any moment, and that nothing is written there."""

import dataclasses
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from rich.console import Console

from data_pipeline.ownership import Owner, machine, owned
from gptoss_dist.distributed.heartbeat import SILENT_S, Beat, View
from gptoss_dist.distributed.watchdog import LOOK_S
from gptoss_dist.tracking.live import curve
from gptoss_dist.tracking.live.ranks import RANKS_FILE, RanksRecorder, RanksReport, RankState, read_ranks
from gptoss_dist.tracking.live.screen import plain, screen
from gptoss_dist.tracking.live.snapshot import RunWatch
from gptoss_dist.tracking.tracker import Tracker, read_metrics
from gptoss_dist.train.faults import RankStates
from launch.watch import main

HOSTILE = "\x1b]0;owned\x07[bold]</script>"


def begin(folder, last_step=100, **options):
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"train: {{steps: {last_step}}}\n")
    return Tracker(folder, run_name="x", enabled=False, tags={"world_size": "2"}, **options)


def log(tracker, steps):
    for step in steps:
        tracker.log(step, {"loss/train": 5.0 / step, "progress/tokens": 100.0 * step, "optim/lr": 1e-3})


def write_ranks(folder, states, age_s=0.0):
    content = {"time": time.time() - age_s, "ranks": [dataclasses.asdict(state) for state in states]}
    (folder / RANKS_FILE).write_text(json.dumps(content))


def everything_in(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_a_run_is_followed_while_it_is_written(tmp_path):
    """Through damaged lines, a resume and a fresh start in the same folder; each look agrees with the whole file."""
    folder = tmp_path / "run"
    tracker = begin(folder)
    watch = RunWatch(folder)
    assert watch.look().state.kind in ("running", "waiting") and watch.look().step == 0
    stop, seen = threading.Event(), []

    def write():
        for step in range(1, 301):
            log(tracker, [step])
            if step % 100 == 0:
                with open(folder / "metrics.jsonl", "ab") as file:
                    file.write(b"\xff\n")
            time.sleep(0.001)
        stop.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not stop.is_set():
        seen.append(watch.look().step)
    thread.join()
    assert seen == sorted(seen) and len(set(seen)) > 5, "it saw the run grow"

    def agrees():
        snapshot, rows = watch.look(), read_metrics(folder, lambda text: None)
        losses = [(row["step"], row["metrics"]["loss/train"]) for row in rows]
        return list(zip(snapshot.loss.steps, snapshot.loss.values)) == losses and losses

    assert len(agrees()) == 300
    tracker.close("KILLED")
    tracker = begin(folder, resumed_step=250)
    log(tracker, range(251, 261))
    snapshot = watch.look()
    assert snapshot.resumes == [250] and snapshot.step == 260 and len(agrees()) == 260
    assert len(agrees()) == 260 and RunWatch(folder).look().loss == snapshot.loss
    tracker.close("FINISHED")
    log(begin(folder), range(1, 4))  # the earlier run's file is set aside
    assert (folder / "metrics.1.jsonl").exists() and watch.look().step == 3 and len(agrees()) == 3
    assert watch.look().resumes == []


def test_looks_that_began_early_and_late_agree_whatever_was_logged(tmp_path):
    """Losses that are no number, metrics from before a resume, a return that was none, lines of an earlier step."""
    folder, nan = tmp_path / "run", float("nan")
    watch = None

    def agree():
        looks = [one.look() for one in (watch, RunWatch(folder))]
        names = ("step", "loss", "validation", "newest", "resumes", "rewinds", "seconds_per_step")
        early, late = ({name: getattr(look, name) for name in names} for look in looks)
        assert early == late
        return looks[0]

    tracker = begin(folder)
    watch = RunWatch(folder)
    for step in range(1, 21):
        loss = nan if step in (7, 20) else 5.0 / step
        tracker.log(step, {"loss/train": loss, "optim/lr": 1e-3, "progress/tokens": 10.0 * step})
        if step % 5 == 0:
            tracker.log(step, {"loss/val": nan if step == 20 else 6.0 / step, "events/checkpoint": step // 5})
            tracker.log(step - 1, {"events/checkpoint": step // 5 - 1})
            agree()
    look = agree()
    assert look.step == 20 and len(look.loss.steps) == 18 and look.newest["loss/train"] == 5.0 / 19
    assert look.newest["loss/val"] == 0.4 and look.newest["events/checkpoint"] == 4
    tracker.event(18, "rewind", "the loss rose")
    tracker.close("KILLED")
    tracker = begin(folder, resumed_step=12)
    look = agree()
    assert look.newest["loss/val"] == 0.6 and look.step == 12 and (look.resumes, look.rewinds) == ([], [12])
    log(tracker, range(13, 16))
    tracker.close("KILLED")
    tracker = begin(folder, resumed_step=14)
    tracker.event(14, "resume", "resumed")
    log(tracker, range(15, 18))
    look = agree()
    assert (look.resumes, look.rewinds, look.step) == ([14], [12], 17)
    assert "resumed at 14, went back to 12" in plain(look)
    tracker.close("FINISHED")
    begin(folder, resumed_step=17).close("FINISHED")
    assert agree().resumes == [14], "a finished run that is started again has nothing to train"


def test_nothing_is_written_and_a_folder_that_goes_is_told(tmp_path):
    folder = tmp_path / "run"
    tracker = begin(folder)
    log(tracker, range(1, 6000))  # more than a segment of columns
    before = everything_in(folder)
    watch = RunWatch(folder)
    plain(watch.look())
    assert everything_in(folder) == before
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="has been deleted or renamed"):
        watch.look()
    with pytest.raises(ValueError, match="there is no such folder"):
        RunWatch(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        RunWatch(tmp_path / "empty")


def owner_record(folder, *, alive=None, here=True, age_s=0.0):
    """Leave the record of an owner that has died on this machine, or that was heard of on another one."""
    me = Owner("elsewhere", machine() if here else "another boot", 2**22 + 1, "7", "2026-01-01 00:00:00", "t" * 16)
    path = folder / ".owner-1"
    path.write_text(json.dumps({name: getattr(me, name) for name in me.__struct_fields__}))
    os.utime(path, (time.time() - age_s,) * 2)


def states(folder):
    """Yield the name of a state and what brings it about, each in a folder of its own."""
    old = {"steps": range(1, 11)}
    yield "waiting", lambda f: ((f / "job/1").mkdir(parents=True), (f / "job/1/job.sbatch").write_text("")), {}
    yield "finished", lambda f: (f / "DONE").write_text('{"step": 10}'), old
    yield "finished", lambda f: None, old | {"end": "FINISHED"}
    yield "stopped", lambda f: (f / "STOPPED").write_text('{"step": 9, "reason": "a file STOP"}'), old
    yield "stopped", lambda f: None, old | {"end": "KILLED"}
    yield (
        "failed",
        lambda f: (f / "log.txt").write_text("2026-01-01 00:00:00,1 ERROR gptoss_dist.x: no data\n"),
        (old | {"end": "FAILED"}),
    )
    yield "failed", lambda f: (f / "stalls/step_00000010").mkdir(parents=True), old
    yield "died", lambda f: owner_record(f), old
    yield "died", lambda f: owner_record(f, here=False, age_s=120), old
    yield "running", lambda f: owner_record(f, here=False, age_s=3), old
    yield "starting", lambda f: owner_record(f, here=False, age_s=3), {}


@pytest.mark.parametrize("number", range(11))
def test_the_state_is_what_the_folder_says(tmp_path, number):
    kind, leave, done = list(states(tmp_path))[number]
    folder = tmp_path / "run"
    tracker = begin(folder)
    log(tracker, done.get("steps", []))
    if end := done.get("end"):
        tracker.close(end)
    if kind == "waiting":
        for name in ("tracking/journal.jsonl", "metrics.jsonl"):
            os.utime(folder / name, (1e9, 1e9))
    leave(folder)
    state = RunWatch(folder).look().state
    assert state.kind == kind, state
    assert state.is_over == (kind in ("finished", "stopped", "failed", "died"))
    expected = {"failed": "no data|stalls/step_00000010", "stopped": "a file STOP|at step 10", "waiting": "job/1"}
    assert re.search(expected.get(kind, "."), state.text)


def test_a_living_run_that_gets_nowhere_is_called_stalled(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    now = [time.time() - 400]
    monkeypatch.setattr("gptoss_dist.tracking.tracker._now", lambda: now[0])
    tracker = begin(folder)
    for step in range(1, 11):
        now[0] += 2
        log(tracker, [step])
    with owned(folder):
        watch = RunWatch(folder)
        state = watch.look().state
        assert state.kind == "stalled" and "6 min" in state.text and "a step takes 2 s" in state.text
        write_ranks(folder, [RankState(0, "a", 11, "compute"), RankState(1, "b", 10, "data", is_behind=True)])
        assert "in data" in watch.look().state.text and watch.look().remaining_s is None
        write_ranks(folder, [RankState(0, "a", 11, "compute"), RankState(1, "b", 11, "data", is_silent=True)])
        assert "rank 1 does not answer" in watch.look().state.text
        write_ranks(folder, [RankState(0, "a", 11, "validation")])
        assert watch.look().state.text == "running: validation"
        write_ranks(folder, [RankState(0, "a", 11, "validation")], age_s=60)
        assert watch.look().state.kind == "stalled"
    assert watch.look().state.kind == "died"


def test_ranks_that_are_silent_behind_or_slow_come_first(tmp_path):
    ranks = [RankState(rank, f"n{rank}", 9, "compute", measured_step=5, own_ms=100.0) for rank in range(20)]
    ranks[17] = dataclasses.replace(ranks[17], is_silent=True)
    ranks[11] = dataclasses.replace(ranks[11], step=8, is_behind=True)
    ranks[5] = dataclasses.replace(ranks[5], own_ms=250.0)
    report = RanksReport(time.time(), ranks)
    assert [state.rank for state in report.notable(4)] == [17, 11, 5, 0]
    assert report.lag(ranks[5]) == 2.5 and report.lag(ranks[0]) == 1.0
    assert report.notable(20) == ranks
    folder = tmp_path / "run"
    log(begin(folder), [1, 2])
    write_ranks(folder, ranks)
    with owned(folder):
        text = plain(RunWatch(folder).look())
    assert re.search(r"17 +n17 +9 +compute +100.0 +1.00 +silent", text) and "behind" in text and "slow" in text
    assert "and 12 more" in text


def test_rank_0_writes_down_what_all_ranks_do(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("gptoss_dist.train.faults.time.monotonic", lambda: now[0])
    beats = {rank: Beat(rank, f"n{rank}", "m", 1, "s", step=3, phase="data", own_ms=5.0) for rank in range(3)}
    states = RankStates(lambda: View(dict(beats), frozenset(), 0.0))
    assert [state.is_silent for state in states()] == [False] * 3
    now[0] += 2 * LOOK_S + SILENT_S + 1
    beats[1] = dataclasses.replace(beats[1], count=9, step=4)
    assert [state.is_silent for state in states()] == [False, False, True], "rank 0 is the one who looks"
    assert [state.step for state in states()] == [3, 4, 3] and not any(state.is_behind for state in states())
    now[0] += 16  # rank 2 is not where rank 1 was then; where rank 0 is, is 5 s old
    beats[0], beats[1] = dataclasses.replace(beats[0], step=4), dataclasses.replace(beats[1], step=9)
    assert [state.is_behind for state in states()] == [False, False, True]

    (tmp_path / "tracking").mkdir()
    recorder = RanksRecorder(tmp_path, states)
    deadline = time.time() + 10
    while read_ranks(tmp_path) is None and time.time() < deadline:
        time.sleep(0.01)
    recorder.close()
    assert [(state.rank, state.host) for state in read_ranks(tmp_path).ranks] == [(0, "n0"), (1, "n1"), (2, "n2")]
    assert os.listdir(tmp_path / "tracking") == ["ranks.json"]
    RanksRecorder(tmp_path / "deleted", states).close()
    assert not (tmp_path / "deleted").exists(), "a folder that was deleted stays so"
    (tmp_path / RANKS_FILE).write_text('{"time": 1, "ranks": [{"rank": "x"}]}')
    assert read_ranks(tmp_path) is None


@pytest.mark.parametrize("size", [(60, 18), (80, 24), (110, 40), (200, 60)])
def test_a_screen_fits_its_terminal_and_shows_texts_as_texts(tmp_path, size):
    folder = tmp_path / "run"
    tracker = begin(folder)
    log(tracker, range(1, 80))
    tracker.log(79, {"loss/val": 0.07, "perf/mfu": 0.314, "perf/tokens_per_s": 12_345.0})
    (folder / "samples/step_00000070.txt").write_text(f"{HOSTILE}\n{'long ' * 100}\n\n----\n\nsecond\n")
    messages = [f"2026-01-01 10:00:{n:02d},1 INFO a.b: line {n} {HOSTILE}\n" for n in range(30)]
    (folder / "log.txt").write_text("".join(messages))
    write_ranks(folder, [RankState(rank, "host", 80, "compute") for rank in range(30)])
    with owned(folder):
        snapshot = RunWatch(folder).look()
    console = Console(width=size[0], height=size[1], force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(screen(snapshot, console))
    lines = captured.get().split("\n")
    assert len(lines) <= size[1] and max(map(len, lines)) <= size[0]
    assert "step 79/100 (79 %)" in captured.get() and "line 29" in captured.get()
    assert "\x1b" not in captured.get() and "\\x1b]0;owned" in captured.get() and "[bold]" in captured.get()
    text = plain(snapshot)
    assert "31.4 % (model FLOPs)" in text and "0.0700 (step 79)" in text and "\x1b" not in text


def test_the_command_in_a_pipe_prints_once(tmp_path, capsys):
    folder = tmp_path / "run"
    log(begin(folder), range(1, 11))
    assert main([str(folder), "--once"]) == 0
    assert "step 10/100 (10 %)" in capsys.readouterr().out
    assert main([str(folder)]) == 0  # pytest's output is no terminal
    assert "step 10/100" in capsys.readouterr().out
    assert main([str(tmp_path / "nothing")]) == 2
    assert "watch.py: " in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.distributed
@pytest.mark.parametrize("end", ["of the run", "by Ctrl-C"])
def test_the_command_on_a_terminal_follows_to_the_end(tmp_path, end):
    folder = tmp_path / "[" / "x]"  # no markup
    tracker = begin(folder, last_step=30)
    leader, follower = pty.openpty()
    with owned(folder):
        log(tracker, range(1, 11))
        process = subprocess.Popen(
            [sys.executable, "launch/watch.py", str(folder), "--interval", "0.1"],
            stdout=follower,
            stderr=follower,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
        )
        os.close(follower)
        output = [os.read(leader, 2**16)]  # it shows something
        if end == "by Ctrl-C":
            while b"step 10/30" not in b"".join(output):
                output.append(os.read(leader, 2**16))
            process.send_signal(signal.SIGINT)
            process.wait(20)
        log(tracker, range(11, 31))
        (folder / "DONE").write_text('{"step": 30}')
    while True:
        try:
            output.append(os.read(leader, 2**16))
        except OSError:  # the other end is closed
            break
    os.close(leader)
    assert process.wait(20) == 0
    text = b"".join(output).decode()
    expected = "step 10/30" if end == "by Ctrl-C" else "step 30/30"
    assert expected in text.rpartition("\x1b[?1049l")[2], "the last screen stays"
    assert ("finished at step 30" in text) == (end == "of the run")


def test_reading_runs_imports_no_torch():
    rooms = "gptoss_dist.tracking.live.command, gptoss_dist.tracking.pages.run_page"
    code = f"import sys, {rooms}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_curves_of_text():
    x = list(range(100))
    lines = curve.draw(x, x, 40, 5)
    assert len(lines) == 5 and all(len(line) <= 40 for line in lines)
    assert lines[0].rstrip()[-1] != " " and lines[0].strip()[0].isdigit() and len(lines[4].rstrip()) < 20
    stars = curve.draw(x, x, 40, 5, only_ascii=True)
    assert {char for line in stars for char in line[8:]} <= set("* ")
    assert [line.count("*") > 0 for line in stars] == [True] * 5
    assert curve.draw([1], [1.0], 40, 5) == curve.draw([1, 2], [float("nan")] * 2, 40, 5) == ["(not enough values yet)"]
    falling = np.concatenate([np.linspace(9, 3, 10), np.linspace(3, 2, 290)])
    falling[200:203] = 500.0
    assert curve.limits(falling) == (2.0, pytest.approx(3.5, abs=0.05)), "no height of the beginning, and no spike"
    assert curve.limits(np.append(falling, [500.0] * 20))[1] == 500, "it has diverged"
    assert curve.limits(np.array([9.0, 4.1, 3.6, 4.0]), is_sparse=True) == (3.6, 4.1)
    assert curve.limits(np.array([2.0])) == curve.limits(np.array([2.0]), is_sparse=True) == (2.0, 2.0)
    flat = curve.draw([1, 2, 3], [2.0, 2.0, 2.0], 40, 5)
    assert len(flat) == 5 and "2" in flat[2]
