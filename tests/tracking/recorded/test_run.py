"""What is known of a run from its folder."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from gptoss_dist.model.config import ModelConfig
from gptoss_dist.planner.flops import flops_per_token
from gptoss_dist.tracking.recorded.run import RUNNING, flat, read_run
from gptoss_dist.tracking.records import JOURNAL_FILE, METRICS_FILE, metrics_line
from gptoss_dist.tracking.tracker import Tracker

MODEL = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 512}


def test_hours_count_lost_steps_and_no_pauses(tmp_path):
    lines = [metrics_line(step, 1000.0 + step, {"progress/tokens": 10.0 * step}) for step in range(1, 11)]
    lines.append({"event": "resume", "step": 6, "time": 5000.0})
    # The first process was killed; the second one notes what it does at steps that it has not done.
    lines += [metrics_line(step, 5001.0, {"events/resume": count}) for step, count in ((5, 0.0), (6, 1.0))]
    lines += [metrics_line(step, 5000.0 + step, {"progress/tokens": 10.0 * step}) for step in range(7, 13)]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {"op": "run", "uid": "a", "run_name": "n", "experiment": "e", "params": {}, "tags": {}, "dataset": None}
    starts = [start | {"time": 998.0, "resume": 0, "resumed_step": None}]
    starts += [start | {"time": 5000.0, "resume": 1, "resumed_step": 6}]
    (tmp_path / JOURNAL_FILE).parent.mkdir()
    (tmp_path / JOURNAL_FILE).write_text("".join(json.dumps(line) + "\n" for line in starts))
    run = read_run(tmp_path)
    # The first process worked from 998 to 1010, four of its steps were lost; the second one from 5000 on.
    expected = [2.0 + step for step in range(1, 7)] + [12.0 + step for step in range(7, 13)]
    np.testing.assert_allclose(3600 * run.hours, expected)
    assert run.tokens.tolist() == [10.0 * step for step in range(1, 13)]
    assert [(event.kind, event.step) for event in run.events] == [("resume", 6)]
    assert run.status == RUNNING


def test_a_run_of_the_tracker_is_read_back(tmp_path):
    folder = tmp_path / "night"
    config = {"model": MODEL, "data": {"seq_len": 128}, "optim": {"lr": 1e-3}}
    tracker = Tracker(folder, run_name="x", enabled=False, params=flat(config), tags={"host": "here"})
    for step in range(1, 4):
        tracker.log(step, {"progress/tokens": 1e6 * step, "optim/skipped_steps": float(step >= 2)})
    tracker.tag("host", "there")
    tracker.event(3, "data", "another mixture")
    with pytest.raises(ValueError, match="kind='coffee'"):
        tracker.event(3, "coffee", "")
    tracker.close("FAILED")
    run = read_run(folder)
    assert (run.name, run.status, run.tags["host"]) == ("night", "FAILED", "there")
    assert [(event.kind, event.step) for event in run.events] == [("skipped", 2), ("data", 3)]
    assert run.config["optim.lr"] == "0.001"


def test_a_return_to_a_checkpoint_is_no_resume(tmp_path):
    """Nor does a process of this version add what an earlier one recorded in other ways."""
    for step, kind in ((None, None), (2, None), (3, "resume"), (4, None)):
        tracker = Tracker(tmp_path, run_name="x", enabled=False, resumed_step=step)
        if kind:
            tracker.event(step, kind, "told")
        tracker.log(5, {"x": 1.0})
        tracker.close("KILLED")
        time.sleep(0.002)  # times are milliseconds
    assert [(event.kind, event.step) for event in read_run(tmp_path).events] == [("resume", 2), ("resume", 3)]


def test_flops_come_from_the_settings(tmp_path):
    tracker = Tracker(tmp_path, run_name="x", enabled=False)
    tracker.log(1, {"progress/tokens": 1e6})
    tracker.close()
    assert np.isnan(read_run(tmp_path).exaflops).all()
    model = MODEL | {"rope_scaling": {"factor": 32.0}}
    (tmp_path / "config.yaml").write_text(json.dumps({"model": model, "data": {"seq_len": 128}}))
    per_token = flops_per_token(ModelConfig(**MODEL), 128).training
    np.testing.assert_allclose(read_run(tmp_path).exaflops, [per_token * 1e6 / 1e18])
    later = Tracker(tmp_path, run_name="x", enabled=False, resumed_step=1)  # of a version that records them
    later.log(2, {"progress/tokens": 2e6, "progress/exaflops": 7.0})
    later.close()
    np.testing.assert_allclose(read_run(tmp_path).exaflops, [per_token * 1e6 / 1e18, 7.0])


def test_reading_runs_does_not_wait_for_torch():
    code = "import sys, gptoss_dist.tracking.recorded.run; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
