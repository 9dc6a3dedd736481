"""The local file is the truth; MLflow gets every point once, whatever fails on the way, and training never waits."""

import json
import logging
import math
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from gptoss_dist.tracking.delivery import shipper
from gptoss_dist.tracking.tracker import main, read_metrics, read_resume_steps, sync
from tests.support.ranks import environment
from tests.support.tracked import history, runs_of, start

POINTS = 300


@pytest.fixture
def dead_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        yield sock.getsockname()[1]


def test_dead_server_costs_training_nothing_and_sync_sends_all_later(dead_port, tmp_path, caplog, client, store):
    run_dir = tmp_path / "run"
    tracker = start(run_dir, uri=f"http://user:secret@127.0.0.1:{dead_port}")
    began = time.perf_counter()
    for step in range(1, 201):
        tracker.log(step, {"loss/train": 1 / step, "optim/lr": 1e-3})
    assert time.perf_counter() - began < 1
    assert tracker.run_id is None
    (run_dir / "note.txt").write_text("hello")
    tracker.artifact(run_dir / "note.txt", "notes")
    with caplog.at_level(logging.WARNING):
        began = time.perf_counter()
        tracker.close(timeout=15)
    assert time.perf_counter() - began < 16
    assert f"python -m gptoss_dist.tracking sync {run_dir}" in caplog.text
    assert "secret" not in caplog.text + (run_dir / "tracking" / "cursor.json").read_text()
    assert len(read_metrics(run_dir)) == 200

    # The folder is moved, then sent to another store: once, again, and again after the cursor was lost.
    moved = run_dir.rename(tmp_path / "elsewhere")
    for _ in range(2):
        assert main(["sync", str(moved), "--uri", store]) == 0
    (moved / "tracking" / "cursor.json").write_text("{tor")
    assert main(["sync", str(moved), "--uri", store]) == 0
    (run,) = runs_of(client)
    assert history(client, run.info.run_id, "loss/train") == [(step, 1 / step) for step in range(1, 201)]
    assert run.info.status == "FINISHED"
    assert [item.path for item in client.list_artifacts(run.info.run_id, "notes")] == ["notes/note.txt"]


def test_a_server_that_accepts_and_says_nothing_cannot_hold_close(tmp_path, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # the thread is to end with the test
        tracker = start(tmp_path / "run", uri=f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.perf_counter()
        for step in range(200):
            tracker.log(step, {"loss/train": 1.0})
        assert time.perf_counter() - began < 1
        time.sleep(0.2)
        began = time.perf_counter()
        tracker.close(timeout=0.5)
        assert time.perf_counter() - began < 2
        tracker._thread.join(20)
        assert not tracker._thread.is_alive(), "the abandoned thread gives up after its request"


@pytest.mark.heavy
def test_server_lost_mid_run_every_point_arrives_once(tmp_path, client, store, monkeypatch):
    """Requests fail before the store has acted, and after it has (the answer is lost), in the middle of training."""
    import mlflow

    calls = {"total": 0, "lost": 0, "unheard": 0}
    down = [False]

    class Flaky(mlflow.MlflowClient):
        def _maybe(self, method, *args, **kwargs):
            calls["total"] += 1
            if down[0] or calls["total"] % 3 == 1:
                calls["lost"] += 1
                raise ConnectionError("server is gone")
            result = method(*args, **kwargs)
            if calls["total"] % 3 == 2:
                calls["unheard"] += 1
                raise ConnectionError("the answer was lost")
            return result

        def create_run(self, *args, **kwargs):
            return self._maybe(super().create_run, *args, **kwargs)

        def log_batch(self, *args, **kwargs):
            return self._maybe(super().log_batch, *args, **kwargs)

    monkeypatch.setattr(mlflow, "MlflowClient", Flaky)
    monkeypatch.setattr("gptoss_dist.tracking.tracker._MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr(shipper, "_METRICS_PER_REQUEST", 90)
    run_dir = tmp_path / "run"
    (tmp_path / "run.yaml").write_text("a: 1")
    tracker = start(run_dir)  # no uri: the database in the working directory
    tracker.artifact(tmp_path / "run.yaml")
    tracker.artifact(tmp_path / "no such file")
    for step in range(POINTS):
        down[0] = 100 <= step < 200
        tracker.log(step, {"loss/train": step / 7, "loss/bad": math.nan if step == 5 else 1.0, "odd name?": 2.0})
        time.sleep(0.004)
    tracker.tag("note", "done")
    deadline = time.monotonic() + 60  # the flaky server needs more attempts than a closing tracker makes
    while tracker._shipper.pending() and time.monotonic() < deadline:
        time.sleep(0.05)
    tracker.close()

    assert calls["lost"] > 3 and calls["unheard"] > 3
    (run,) = runs_of(client)
    run_id = run.info.run_id
    assert tracker.run_id == run_id
    assert history(client, run_id, "loss/train") == [(step, step / 7) for step in range(POINTS)]
    assert len(history(client, run_id, "loss/bad")) == POINTS - 1, "NaN is not sent"
    assert len(history(client, run_id, "odd name_")) == POINTS
    assert run.data.params == {"optim.lr": "0.0003", "odd_key_": "True"}
    assert run.data.tags["git.sha"] == "abc" and run.data.tags["note"] == "done"
    assert run.data.tags["dataset.digest"] == "d" * 64
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["stdlib"]
    assert run.info.status == "FINISHED" and run.info.run_name == "unit"
    assert [item.path for item in client.list_artifacts(run_id)] == ["run.yaml"]


def test_resume_continues_the_run_without_changing_parameters(tmp_path, client, store):
    run_dir = tmp_path / "run"
    first = start(run_dir)
    for step in range(1, 11):
        first.log(step, {"loss/train": float(step)})
    first.close("KILLED")
    second = start(
        run_dir, params={"optim.lr": 1e-5, "new": 1}, resume_run_id=first.run_id, resumed_step=6, dataset=None
    )
    for step in range(7, 9):
        second.log(step, {"loss/train": -float(step)})
    second.close()

    (run,) = runs_of(client)
    assert second.run_id == first.run_id == run.info.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.lr": "0.0003", "odd_key_": "True", "new": "1"}
    assert run.data.tags["resume.1.optim.lr"] == "1e-05"
    assert run.data.tags["resumed_from_step"] == "6"
    assert (8, -8.0) in history(client, run.info.run_id, "loss/train")
    rows = read_metrics(run_dir)
    assert [(row["step"], row["metrics"]["loss/train"]) for row in rows] == [
        *((step, float(step)) for step in range(1, 7)),
        (7, -7.0),
        (8, -8.0),
    ]
    assert read_resume_steps(run_dir) == [6]


def test_run_unknown_to_the_server_is_sent_whole(tmp_path, client, store, empty_store, caplog):
    tracker = start(tmp_path / "run", enabled=False)
    tracker.log(1, {"loss/train": 4.0})
    tracker.close()
    assert runs_of(client) == []
    resumed = start(tmp_path / "run", resume_run_id="0" * 32, resumed_step=1)
    resumed.log(2, {"loss/train": 3.0})
    resumed.close()
    (run,) = runs_of(client)
    assert "has no run 000" in caplog.text
    assert history(client, run.info.run_id, "loss/train") == [(1, 4.0), (2, 3.0)]

    # A second server gets everything too, though the cursor says that all was acknowledged.
    shutil.copy(empty_store, tmp_path / "other.db")
    other = type(client)(tracking_uri=f"sqlite:///{tmp_path / 'other.db'}")
    run_id = sync(tmp_path / "run", f"sqlite:///{tmp_path / 'other.db'}")
    assert history(other, run_id, "loss/train") == [(1, 4.0), (2, 3.0)]
    assert other.get_run(run_id).data.params["optim.lr"] == "0.0003"


def test_metrics_survive_a_cut_at_any_byte(tmp_path):
    run_dir = tmp_path / "run"
    tracker = start(run_dir, enabled=False)
    for step in range(1, 5):
        tracker.log(step, {"loss/train": 0.5 * step})
    tracker.close()
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        assert [row["step"] for row in read_metrics(run_dir)] == list(range(1, complete + 1))
    # A process that starts on a torn file does not lose its own first line to it.
    path.write_bytes(whole[:-5])
    resumed = start(run_dir, enabled=False, resumed_step=3)
    resumed.log(4, {"loss/train": 9.0, "loss/z": math.inf, "loss/aux": math.nan})
    resumed.log(4, {"loss/val": -math.inf})
    resumed.close()
    last = read_metrics(run_dir)[-1]
    assert last["step"] == 4 and math.isnan(last["metrics"].pop("loss/aux"))
    assert last["metrics"] == {"loss/train": 9.0, "loss/z": math.inf, "loss/val": -math.inf}
    for line in path.read_text().splitlines()[4:]:
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_only_the_final_branch_counts(tmp_path):
    run_dir = tmp_path / "run"
    tracker = start(run_dir, enabled=False)
    for step in range(1, 9):
        tracker.log(step, {"x": 1.0})
    tracker.close()
    for resumed_step, branch in ((6, 2.0), (4, 3.0), (5, 4.0)):
        tracker = start(run_dir, enabled=False, resumed_step=resumed_step)
        for step in (resumed_step + 1, resumed_step + 2):
            tracker.log(step, {"x": branch})
        tracker.close()
    assert [row["metrics"]["x"] for row in read_metrics(run_dir)] == [1, 1, 1, 1, 3, 4, 4]
    assert read_resume_steps(run_dir) == [4, 5], "the resume at 6 lies on a branch abandoned at 4"


def test_fresh_start_in_a_used_folder_keeps_the_old_rows_aside(tmp_path):
    for value in (1.0, 2.0, 3.0):
        tracker = start(tmp_path, enabled=False)
        tracker.log(1, {"x": value})
        tracker.close()
    assert read_metrics(tmp_path)[0]["metrics"] == {"x": 3.0}
    assert json.loads((tmp_path / "metrics.1.jsonl").read_text())["metrics"] == {"x": 1.0}
    assert json.loads((tmp_path / "metrics.2.jsonl").read_text())["metrics"] == {"x": 2.0}
    with pytest.raises(ValueError, match="does not exist"):
        read_metrics(tmp_path / "nothing")


def test_full_disk_warns_once_and_training_goes_on(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    tracker = start(tmp_path, enabled=False, resumed_step=3)
    for step in range(4, 9):
        tracker.log(step, {"x": 1.0})
    tracker.close()
    assert len([record for record in caplog.records if "metrics.jsonl" in record.getMessage()]) == 1


def test_without_mlflow_one_warning_and_local_files(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    tracker = start(tmp_path / "run")
    tracker.log(1, {"x": 1.0})
    tracker._thread.join(10)
    tracker.close()
    assert len(caplog.records) == 1 and "mlflow cannot be imported" in caplog.text
    assert len(read_metrics(tmp_path / "run")) == 1


@pytest.mark.heavy
def test_a_user_without_a_name_and_a_home_has_mlflow(tmp_path):
    """As in a container that is started under any id: importing mlflow fails where there is no home."""
    tracked = (
        "import os, pwd, sys; os.environ.pop('HOME', None); pwd.getpwuid = {}.__getitem__\n"
        "from tests.support.tracked import start\n"
        "tracker = start(sys.argv[1], message=print)\n"
        "tracker.log(1, {'loss/train': 1.0}); tracker.close(timeout=60); print(tracker.run_id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", tracked, str(tmp_path / "run")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert re.fullmatch(r"[0-9a-f]{32}\n", done.stdout), done.stdout + done.stderr


def test_close_refuses_an_unknown_status(tmp_path):
    tracker = start(tmp_path, enabled=False)
    with pytest.raises(ValueError, match="FINISHED"):
        tracker.close("DONE")
    tracker.close()


def test_sync_explains_itself(tmp_path, capsys):
    assert main(["sync", str(tmp_path)]) == 1
    assert "give the folder of a run" in capsys.readouterr().err
