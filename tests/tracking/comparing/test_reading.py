"""Runs read from MLflow are those of their folders: what a resume abandoned is gone, and mistakes are one line."""

import json
import random
import shutil

import numpy as np
import pytest

from gptoss_dist.tracking.comparing.reading import Server, final_branch, is_folder, read_folder
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
    server = Server(store)
    assert [run.name for run in server.experiment("made-up")] == ["run0", "run1", "run2"]
    assert [run.name for run in server.experiment("made-up", "params.`optim.lr` = '0.002'")] == ["run1"]
    assert [run.name for run in server.experiment("made-up", "params.optim.lr = '0.003'")] == ["run2"]
    assert all(run.folder is None for run in server.experiment("made-up"))
    run_id = Cursor.load(runs[1], pytest.fail).run_id
    server._client.set_tag(run_id, "run.folder", str(runs[1]))
    assert [run.folder for run in server.experiment("made-up")] == [None, runs[1], None]
    shutil.rmtree(runs[1])
    assert [run.folder for run in server.experiment("made-up")] == [None] * 3


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
