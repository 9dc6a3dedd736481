"""Delivery where the server, the files, the clock or the environment are not as one would like."""

import json
import shutil
import time

import pytest

from gptoss_dist.tracking.delivery import requests
from gptoss_dist.tracking.delivery.cursor import Cursor
from gptoss_dist.tracking.tracker import main, sync
from tests.support.tracked import history, runs_of, start


@pytest.fixture
def older_server(monkeypatch):
    """A server that takes 500 characters, and refuses a whole request for one value it does not like."""
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, INVALID_PARAMETER_VALUE

    class Older(mlflow.MlflowClient):
        def log_batch(self, run_id, metrics=(), params=(), tags=(), **kwargs):
            for entity in (*params, *tags):
                if len(entity.value) > 500 or entity.value == "cursed":
                    raise MlflowException(f"Param value {entity.value[:9]!r} is invalid", INVALID_PARAMETER_VALUE)
            if any(metric.key == "cursed" for metric in metrics):
                raise MlflowException("Metric is invalid", INVALID_PARAMETER_VALUE)
            return super().log_batch(run_id, metrics, params, tags, **kwargs)

        def log_inputs(self, *args, **kwargs):
            raise MlflowException("No API found", ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(mlflow, "MlflowClient", Older)


def test_what_a_server_refuses_is_cut_or_left_out_and_the_rest_arrives(tmp_path, client, store, older_server):
    said = []
    params = {f"p{i}": str(i) for i in range(120)} | {"long": "x" * 3000, "bad": "cursed"}
    tags = {"note": "y" * 600, "worse": "cursed", "fine": "yes", "half\ud800": "a\0b\udcff"}
    tracker = start(tmp_path / "run", params=params, tags=tags, message=said.append)
    tracker.log(1, {"loss/train": 1.0, "cursed": 2.0, "optim/lr": 3.0})
    tracker.tag("later", "cursed")
    tracker.tag("last", "ok")
    tracker.close()
    (run,) = runs_of(client)
    assert run.data.params == {f"p{i}": str(i) for i in range(120)} | {"long": "x" * 500}
    assert run.data.tags["note"] == "y" * 500 and run.data.tags["fine"] == "yes" and run.data.tags["last"] == "ok"
    assert run.data.tags["half_"] == "ab?"
    assert not {"worse", "later", "bad"} & (run.data.tags.keys() | run.data.params.keys())
    assert run.data.metrics == {"loss/train": 1.0, "optim/lr": 3.0}
    assert run.info.status == "FINISHED"
    assert all(
        any(word in text for text in said) for word in ("(long)", "(bad)", "(note)", "(worse)", "(cursed)", "dataset")
    )

    # A parameter that was cut is the same when the run goes on.
    resumed = start(tmp_path / "run", params=params, tags={}, resumed_step=1, message=said.append)
    resumed.close()
    assert "resume.1.long" not in client.get_run(run.info.run_id).data.tags


def test_a_run_deleted_meanwhile_is_sent_anew_and_not_refused_value_by_value(tmp_path, client, store):
    tracker = start(tmp_path / "run")
    tracker.log(1, {"loss/train": 1.0})
    wait_for(lambda: not tracker._shipper.pending())
    client.delete_run(tracker.run_id)
    tracker.log(2, {"loss/train": 2.0})
    wait_for(lambda: not tracker._shipper.pending())
    tracker.close()
    (run,) = runs_of(client)
    assert history(client, run.info.run_id, "loss/train") == [(1, 1.0), (2, 2.0)]


def test_a_deleted_experiment_is_named_with_the_remedy(tmp_path, client, store, capsys):
    experiment = client.create_experiment("tests")
    client.delete_experiment(experiment)
    said = []
    tracker = start(tmp_path / "run", message=said.append)
    tracker.log(1, {"loss/train": 1.0})
    tracker.close()
    assert "'tests' is deleted" in said[0] and f"mlflow experiments restore --experiment-id {experiment}" in said[0]
    assert main(["sync", str(tmp_path / "run")]) == 1
    assert f"mlflow experiments restore --experiment-id {experiment}" in capsys.readouterr().err
    client.restore_experiment(experiment)
    assert history(client, sync(tmp_path / "run"), "loss/train") == [(1, 1.0)]


def test_an_experiment_that_another_run_makes_meanwhile_is_taken(tmp_path, client, store, monkeypatch, caplog):
    import mlflow

    made = client.create_experiment("tests")
    seen = iter([None])  # at first it was not there
    find = mlflow.MlflowClient.get_experiment_by_name
    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", lambda self, name: next(seen, find(self, name)))
    tracker = start(tmp_path / "run", uri=store)
    tracker.log(1, {"loss/train": 1.0})
    tracker.close()
    (run,) = runs_of(client)
    assert run.info.experiment_id == made and run.info.status == "FINISHED"
    assert not caplog.records


def test_a_clock_that_jumps_back_does_not_end_a_run_before_it_began(tmp_path, client, store, monkeypatch):
    tracker = start(tmp_path / "run")
    wait_for(lambda: tracker.run_id)
    real = time.time
    monkeypatch.setattr("gptoss_dist.tracking.tracker.time.time", lambda: real() - 86400)
    tracker.close()
    (run,) = runs_of(client)
    assert run.info.status == "FINISHED" and run.info.end_time >= run.info.start_time


METRICS = [{"step": step, "time": 100.0, "metrics": {"loss/train": float(step)}} for step in range(1, 21)]


DAMAGED_CURSORS = [
    "",
    "{",
    "[]",
    "null",
    '"a"',
    "\0\0\0",
    '{"metrics_offset": "5"}',
    '{"metrics_offset": -5}',
    '{"metrics_offset": 1e400}',
    '{"metrics_offset": 99999999}',
    '{"metrics_offset": 7}',
    '{"journal_offset": 3}',
    '{"journal_offset": true}',
    '{"run_id": 5}',
    '{"uri": 5}',
    '{"database": []}',
    "[" * 100_000,
]


@pytest.mark.parametrize("text", DAMAGED_CURSORS, ids=range(len(DAMAGED_CURSORS)))
def test_a_damaged_cursor_begins_anew_and_is_told(tmp_path, text):
    (tmp_path / "tracking").mkdir()
    for name in ("metrics.jsonl", "tracking/journal.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n' * 5)
    said = []
    assert Cursor.load(tmp_path, said.append) == Cursor() and not said
    (tmp_path / "tracking" / "cursor.json").write_text('{"metrics_offset": 9, "journal_offset": 45, "newer": 1}')
    assert Cursor.load(tmp_path, pytest.fail) == Cursor(metrics_offset=9, journal_offset=45)
    (tmp_path / "tracking" / "cursor.json").write_text(text)
    assert Cursor.load(tmp_path, said.append) == Cursor()
    assert len(said) == 1 and "cursor.json" in said[0] and "whole run again" in said[0]


@pytest.mark.parametrize("cursor", ["{", '{"metrics_offset": 7}', '{"run_id": "nonsense"}'])
def test_a_damaged_cursor_or_line_costs_nothing_but_itself(tmp_path, client, store, cursor):
    run_dir = tmp_path / "run"
    tracker = start(run_dir)
    for row in METRICS:
        tracker.log(row["step"], row["metrics"])
    tracker.close()
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join(lines[:5]) + b'{"step": 1e400}\n' + b"".join(lines[6:]))
    with open(run_dir / "tracking" / "journal.jsonl", "ab") as file:
        file.write(b'{"op": "tag"}\n{"op": "end", "time": 5, "status": "DONE"}\n')
    (run_dir / "tracking" / "cursor.json").write_text(cursor)
    said = []
    resumed = start(run_dir, resumed_step=20, message=said.append)
    resumed.log(21, {"loss/train": 21.0})
    resumed.close()
    (run,) = runs_of(client)
    assert history(client, run.info.run_id, "loss/train") == [(step, float(step)) for step in range(1, 22)]
    assert run.info.status == "FINISHED"
    assert sum("damaged lines were" in text or "1 damaged line was" in text for text in said) >= 1


def test_a_journal_without_its_beginning_starts_with_the_next_process(tmp_path, client, store):
    run_dir = tmp_path / "run"
    tracker = start(run_dir, enabled=False)
    tracker.log(1, {"loss/train": 1.0})
    tracker.close()
    path = run_dir / "tracking" / "journal.jsonl"
    path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])
    said = []
    resumed = start(run_dir, resumed_step=1, message=said.append)
    resumed.close()
    (run,) = runs_of(client)
    assert history(client, run.info.run_id, "loss/train") == [(1, 1.0)]
    assert any("journal.jsonl: 1 damaged line was passed over" in text for text in said)


def test_sync_sends_no_file_from_outside_the_runs_folder(tmp_path, client, store, capsys):
    (tmp_path / "secret").write_text("a key")
    tracker = start(tmp_path / "run", enabled=False)
    tracker.artifact(tmp_path / "secret")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "secret")
    tracker.artifact(tmp_path / "run" / "link")
    tracker.close()
    assert main(["sync", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().err.count("outside the run's folder") == 2
    (run,) = runs_of(client)
    assert client.list_artifacts(run.info.run_id) == []


def test_variables_of_mlflow_do_what_they_do_elsewhere(tmp_path, client, store, monkeypatch):
    for name, value in {
        "EXPERIMENT_NAME": "theirs",
        "RUN_NAME": "nightly",
        "TAGS": '{"team": "nlp", "n": 3}',
        "TRACKING_USERNAME": "ada",
        "ENABLE_SYSTEM_METRICS_LOGGING": "true",
        "SYSTEM_METRICS_SAMPLING_INTERVAL": "0.1",
    }.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    said = []
    tracker = start(tmp_path / "run", experiment=None, message=said.append)
    wait_for(lambda: tracker.run_id and client.get_run(tracker.run_id).data.metrics)
    tracker.close()
    (run,) = runs_of(client, "theirs")
    assert run.info.run_name == "nightly" and run.info.user_id == "ada"
    tags = run.data.tags
    assert tags["team"] == "nlp" and tags["n"] == "3" and tags["mlflow.user"] == "ada"
    assert tags["mlflow.source.type"] == "LOCAL" and tags["mlflow.source.name"]
    assert any(key.startswith("system/") for key in run.data.metrics)
    assert not said
    # What is given goes before the environment.
    other = start(tmp_path / "other", experiment="tests")
    other.close()
    assert [run.info.run_id for run in runs_of(client)] == [other.run_id]


def test_mlflow_run_id_continues_a_run_that_something_else_made(tmp_path, client, store, monkeypatch):
    theirs = client.create_run(client.create_experiment("theirs"), run_name="made elsewhere")
    client.log_param(theirs.info.run_id, "optim.lr", "0.5")
    monkeypatch.setenv("MLFLOW_RUN_ID", theirs.info.run_id)
    for options in ({}, {"resumed_step": 1}):
        tracker = start(tmp_path / "run", **options)
        tracker.log(1, {"loss/train": 1.0})
        tracker.close()
        assert tracker.run_id == theirs.info.run_id
    run = client.get_run(theirs.info.run_id)
    assert run.info.run_name == "made elsewhere" and run.data.params["optim.lr"] == "0.5"
    assert run.data.metrics == {"loss/train": 1.0} and run.info.status == "FINISHED"
    assert runs_of(client) == []

    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    said = []
    tracker = start(tmp_path / "wrong", message=said.append)
    tracker.close()
    assert f"MLFLOW_RUN_ID={'f' * 32}" in said[0] and "correct or unset it" in said[0]
    monkeypatch.delenv("MLFLOW_RUN_ID")
    assert sync(tmp_path / "wrong") == runs_of(client)[0].info.run_id


@pytest.mark.parametrize(
    "name, value",
    [
        ("MLFLOW_TAGS", "team=nlp"),
        ("MLFLOW_TAGS", "[1]"),
        ("MLFLOW_TAGS", "[" * 100_000),
        ("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "perhaps"),
    ],
)
def test_a_variable_that_makes_no_sense_is_told_and_left_out(tmp_path, client, store, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    said = []
    tracker = start(tmp_path / "run", message=said.append)
    tracker.close()
    assert len(said) == 1 and said[0].startswith(f"{name}=") and len(said[0]) < 400
    assert runs_of(client)[0].info.status == "FINISHED"


def test_an_operation_that_a_well_server_fails_at_does_not_hold_up_the_end(tmp_path, client, store, monkeypatch):
    import mlflow
    from mlflow.exceptions import MlflowException

    class Sick(mlflow.MlflowClient):
        def log_batch(self, run_id, metrics=(), params=(), tags=(), **kwargs):
            if any(tag.key == "sick" for tag in tags):
                raise MlflowException("out of cheese")  # an internal error
            return super().log_batch(run_id, metrics, params, tags, **kwargs)

    monkeypatch.setattr(mlflow, "MlflowClient", Sick)
    monkeypatch.setattr("gptoss_dist.tracking.tracker._MAX_BACKOFF_S", 0.05)
    said = []
    tracker = start(tmp_path / "run", message=said.append)
    tracker.tag("sick", "yes")
    tracker.tag("last", "ok")
    wait_for(lambda: not tracker._shipper.pending())
    tracker.close()
    (run,) = runs_of(client)
    assert run.data.tags["last"] == "ok" and run.info.status == "FINISHED"
    assert any("out of cheese" in text for text in said)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_name_of_a_metric_is_cut_and_cleaned():
    assert requests.clean_key("loss(a)?" + "x" * 300) == "loss_a__" + "x" * 242


def test_files_of_an_earlier_version_are_read(tmp_path, client, store):
    tracker = start(tmp_path / "run")
    tracker.log(1, {"loss/train": 1.0})
    tracker.close()
    path = tmp_path / "run" / "tracking" / "cursor.json"
    cursor = json.loads(path.read_text())
    assert cursor.pop("database") == "../mlflow.db"
    path.write_text(json.dumps(cursor))
    shutil.rmtree(tmp_path / "mlartifacts", ignore_errors=True)
    resumed = start(tmp_path / "run", resumed_step=1)
    resumed.close()
    assert [run.info.run_id for run in runs_of(client)] == [tracker.run_id]
