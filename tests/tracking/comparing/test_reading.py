"""Runs read from MLflow are those of their folders: what a resume abandoned is gone, and mistakes are one line."""

import json
import random
import shutil

import numpy as np
import pytest

from gptoss_dist.tracking.comparing.reading import (
    COMPARISON,
    KIND_TAG,
    Server,
    final_branch,
    is_folder,
    read_folder,
)
from gptoss_dist.tracking.delivery.cursor import Cursor
from gptoss_dist.tracking.recorded.columns import read_columns
from gptoss_dist.tracking.records import metrics_line
from gptoss_dist.tracking.tracker import sync
from tests.support.recorded_runs import write_run


def lines_of_a_run(seed):
    """A run that is validated and goes back now and then; its hours advance."""
    rng = random.Random(seed)
    step, time, lines = 0, 1000.0, []
    while step < 60:
        step, time = step + 1, time + 1 + rng.random()
        lines.append(metrics_line(step, time, {"loss/train": rng.random(), "progress/tokens": 10.0 * step}))
        if step % 5 == 0:
            lines.append(metrics_line(step, time + 0.1, {"loss/val": rng.random()}))
        if rng.random() < 0.08:
            step = rng.randrange(step + 1)
            lines.append({"event": "resume", "step": step, "time": time})
    return lines


@pytest.mark.parametrize("seed", range(10))
def test_points_of_abandoned_branches_are_left_out(tmp_path, seed):
    """MLflow gets every line and no word of resumes, in any order; the folder's own reader knows them."""
    lines = lines_of_a_run(seed)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    histories = {}
    for line in lines:
        for name, value in line.get("metrics", {}).items():
            histories.setdefault(name, []).append((line["step"], line["time"], value))
    for points in histories.values():
        random.Random(seed).shuffle(points)
    steps, columns, _ = final_branch({name: np.array(points, float) for name, points in histories.items()})
    expected = read_columns(tmp_path)
    assert steps.tolist() == expected.steps.tolist()
    for name in histories:
        np.testing.assert_array_equal(columns[name], expected[name])


def test_no_points_are_no_run():
    steps, columns, times = final_branch({})
    assert len(steps) == len(times) == len(columns) == 0


@pytest.fixture
def runs(tmp_path, store):
    """Three runs that MLflow has, in the experiment `made-up`."""
    folders = []
    for number in range(3):
        folder = tmp_path / f"run{number}"
        config = {"optim.lr": 0.001 * (number + 1), "tracking.mlflow": True}
        write_run(folder, steps=60, seed=number, config=config, validate_every=20)
        start = json.loads((folder / "tracking/journal.jsonl").read_text().splitlines()[0]) | {"uid": f"{number}a" * 16}
        end = {"op": "end", "time": 2000.0, "status": "FINISHED"}
        (folder / "tracking/journal.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(end)}\n")
        sync(folder, store, pytest.fail)
        folders.append(folder)
    return folders


def test_a_run_of_a_server_is_that_of_its_folder(runs, store):
    expected = read_folder(runs[1])
    found = Server(store).run(Cursor.load(runs[1], pytest.fail).run_id)
    assert found.folder is None and found.name == expected.name and found.status == "FINISHED"
    assert found.config == expected.config and found.dataset["digest"] == expected.dataset["digest"]
    assert found.steps.tolist() == expected.steps.tolist() and set(found.series) == set(expected.series)
    for name, one in expected.series.items():
        assert found.series[name].rows.tolist() == one.rows.tolist()
        np.testing.assert_allclose(found.series[name].values, one.values)
    for axis in ("tokens", "exaflops"):
        np.testing.assert_allclose(found.axes[axis], expected.axes[axis])
    # A server does not say when the process began, only when it logged first.
    np.testing.assert_allclose(np.diff(found.axes["hours"]), np.diff(expected.axes["hours"]), atol=1e-6)


def test_an_experiment_is_read_by_its_name_and_a_filter(runs, store, tmp_path):
    from mlflow import MlflowClient

    server = Server(store)
    assert [run.name for run in server.experiment("made-up")] == ["run0", "run1", "run2"]
    assert [run.name for run in server.experiment("made-up", "params.`optim.lr` = '0.002'")] == ["run1"]
    assert [run.name for run in server.experiment("made-up", "params.optim.lr = '0.003'")] == ["run2"]
    assert all(run.folder is None for run in server.experiment("made-up"))
    run_id = Cursor.load(runs[1], pytest.fail).run_id
    MlflowClient(store).set_tag(run_id, "run.folder", str(runs[1]))
    assert [run.folder for run in server.experiment("made-up")] == [None, runs[1], None]
    shutil.rmtree(runs[1])
    assert [run.folder for run in server.experiment("made-up")] == [None] * 3


def test_what_happened_to_a_run_is_read_from_its_counts_and_tags(runs, store, client):
    run_id, marked = (Cursor.load(folder, pytest.fail).run_id for folder in runs[1:])
    for name, step, when, count in (
        ("resume", 19, 5000, 0),
        ("resume", 20, 5000, 1),
        ("rewind", 52, 9000, 1),
        ("rewind", 30, 9500, 2),  # twice, the second time on the branch that training then took
        ("resume", 60, 9900, 1),
    ):
        client.log_metric(run_id, f"events/{name}", count, timestamp=1000 * when, step=step)
    tags = {"resume.2.optim.lr": "0.2", "resume.2.optim.clip_norm": "3", "resume.10.optim.lr": "0.5"}
    for key, value in (tags | {"kind": "baseline"}).items():
        client.set_tag(run_id, key, value)
    client.set_tag(marked, KIND_TAG, COMPARISON)
    names = [run.name for run in Server(store).experiment("made-up")]
    assert names == ["run0", "run1"], "a tag of the user's hides no run"
    found = Server(store).run(run_id)
    assert [(event.kind, event.step) for event in found.events] == [("resume", 20), ("rewind", 52), ("rewind", 30)]
    assert (found.config["optim.lr"], found.changed) == ("0.5", ["optim.lr"]) and "optim.clip_norm" not in found.config
    assert found.experiment_id == client.get_experiment_by_name("made-up").experiment_id


def test_a_resume_with_other_settings_is_known_from_the_folder(tmp_path):
    write_run(tmp_path / "a", steps=60, config={"data.path": "https://me:hunter2@host/x?key=hunter2"})
    journal = tmp_path / "a/tracking/journal.jsonl"
    start = json.loads(journal.read_text().splitlines()[0])
    again = start | {"params": start["params"] | {"optim.lr": "0.5"}, "experiment_id": "7", "resume": 1}
    journal.write_text(f"{json.dumps(start)}\n{json.dumps(again)}\n")
    found = read_folder(tmp_path / "a")
    assert (found.changed, found.experiment_id) == (["optim.lr"], "7")
    assert "hunter2" not in str(found.config) and "host/x" in found.config["data.path"]


def test_mistakes_are_one_line(runs, store, tmp_path):
    server = Server(store)
    with pytest.raises(ValueError, match=r"--experiment nothing: MLflow at .* has no such experiment"):
        list(server.experiment("nothing"))
    with pytest.raises(ValueError, match=r"MLflow at .*Invalid") as caught:
        list(server.experiment("made-up", "lr == 3"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"MLflow at .*0a0a0a0a"):
        server.run("0a" * 16)
    with pytest.raises(ValueError, match="there is no such database of MLflow; name the server with --uri"):
        Server(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()


def test_a_folder_is_told_from_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ("0a" * 16)).mkdir()
    assert is_folder("0a" * 16) and is_folder("runs/a") and is_folder("missing") and not is_folder("0b" * 16)
