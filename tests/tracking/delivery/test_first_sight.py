"""What MLflow's pages show of a run at first sight: its note, the kind of its experiment, checkpoints as models."""

import json
import shutil
import time

import pytest

from gptoss_dist.tracking.delivery.requests import NOTE_TAG, OWN_TEXT, with_own_text
from gptoss_dist.tracking.tracker import sync
from tests.support.tracked import history, runs_of, start


def models_of(client):
    experiment = client.get_experiment_by_name("tests").experiment_id
    return {model.name: model for model in client.search_logged_models([experiment])}


@pytest.mark.parametrize("made_before", [False, True])
def test_an_experiment_opens_as_one_of_training(tmp_path, client, store, made_before):
    if made_before:
        client.create_experiment("tests", tags={"mlflow.experiment.primaryMetric.name": "theirs"})
    start(tmp_path / "run").close()
    tags = client.get_experiment_by_name("tests").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.experiment.primaryMetric.name"] == ("theirs" if made_before else "loss/val")


def test_parameters_keep_their_order(tmp_path, client, store):
    params = {"z.changed": 1, "b.changed": 2} | {f"p{i}": i for i in range(120)}
    start(tmp_path / "run", params=params).close()
    assert list(runs_of(client)[0].data.params) == list(params), "MLflow's pages show them as they come"


def test_what_people_write_into_a_note_stays(tmp_path, client, store, monkeypatch):
    run_dir, said = tmp_path / "run", []
    given = {NOTE_TAG: "Given.", "state": "mine", "team": "nlp"}
    monkeypatch.setenv("MLFLOW_TAGS", json.dumps(given))
    tracker = start(run_dir, tags={NOTE_TAG: "one", "state": "running"}, message=said.append)
    tracker.tag(NOTE_TAG, "one and a half")
    tracker.close()
    tags = runs_of(client)[0].data.tags
    note = tags[NOTE_TAG]
    assert note == f"one and a half\n\n{OWN_TEXT}\n\nGiven.\n"
    assert (tags["state"], tags["team"]) == ("running", "nlp")
    assert said == ["MLFLOW_TAGS: state is kept current by the run and not taken; choose another name"]
    client.set_tag(tracker.run_id, NOTE_TAG, note + "\nThis is **ours**.\n")
    resumed = start(run_dir, tags={NOTE_TAG: "two"}, resumed_step=1)
    resumed.tag(NOTE_TAG, "three")
    resumed.close()
    assert runs_of(client)[0].data.tags[NOTE_TAG] == f"three\n\n{OWN_TEXT}\n\nGiven.\n\nThis is **ours**.\n"


@pytest.mark.parametrize(
    ("kept", "written"),
    [
        (None, f"note\n\n{OWN_TEXT}\n"),
        ("all theirs", f"note\n\n{OWN_TEXT}\n\nall theirs\n"),
        ("note" + "x" * 496, f"note\n\n{OWN_TEXT}\n"),  # of ours, cut by an earlier version of MLflow
        ("x" * 500, f"note\n\n{OWN_TEXT}\n\n{'x' * 500}\n"),  # theirs, by chance as long
        (f"note\n{OWN_TEXT}\n{'x' * 205}", f"note\n\n{OWN_TEXT}\n\n{'x' * 205}\n"),  # 250 characters
        ("x" * 4999, "x" * 4999),  # no room for ours
    ],
)
def test_a_note_and_what_is_below_it(kept, written):
    assert kept is None or len(kept) in (10, 250, 500, 4999)
    assert with_own_text("note", kept) == written
    assert with_own_text(f"note\n\n{OWN_TEXT}\n\n{'y' * 6000}", kept="") == "y" * 6000, "what is given goes before ours"
    assert len(with_own_text("n" * 4000, "y" * 3000)) <= 5000


def save(run_dir, step):
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text("heavy")
    return folder


def on_disk(client):
    return {int(name[5:]): model.tags.get("on_disk") for name, model in models_of(client).items()}


def test_checkpoints_are_models_with_their_metrics_and_without_weights(tmp_path, client, store):
    run_dir, losses = tmp_path / "run", {10: 3.0, 20: 1.5}
    for attempt in range(3):  # the second process sends what was sent already, the third one other weights
        tracker = start(run_dir, resumed_step=20 if attempt else None, message=pytest.fail)
        for step, loss in losses.items():
            loss -= attempt == 2
            at = tracker.log(step, {"loss/val": loss})
            tracker.checkpoint(step, save(run_dir, step), {"loss/val": loss, "loss/bad": float("nan")}, at)
        tracker.close()
        model = models_of(client)["step_00000020"]
        newest = max(model.metrics, key=lambda metric: metric.timestamp)
        assert (newest.key, newest.value, newest.step) == ("loss/val", 0.5 if attempt == 2 else 1.5, 20)
        if attempt == 1:  # killed before the last request, and removed for a while
            other = client.create_logged_model(
                model.experiment_id, name="step_00000030", source_run_id=tracker.run_id, tags={"on_disk": "removed"}
            )
            losses[30] = 9.0
    assert len(models_of(client)) == 3 and models_of(client)["step_00000030"].model_id == other.model_id
    assert {model.status for model in models_of(client).values()} == {"READY"}
    assert model.source_run_id == tracker.run_id and model.params == {"step": "20"}
    assert model.tags["path"] == "checkpoints/step_00000020"
    assert on_disk(client) == {10: "yes", 20: "yes", 30: "yes"}
    outputs = [output.model_id for output in client.get_run(tracker.run_id).outputs.model_outputs]
    assert sorted(outputs) == sorted(model.model_id for model in models_of(client).values())
    assert len(history(client, tracker.run_id, "loss/val")) == 2 + 2 + 3, "as logged, none from the models"
    assert client.list_logged_model_artifacts(model.model_id) == [], "no weights"


def test_a_checkpoint_is_on_the_disk_only_when_it_has_been_seen_there(tmp_path, client, store):
    run_dir = tmp_path / "run"
    tracker = start(run_dir)
    for step in (10, 20, 30, 40):
        tracker.checkpoint(step, save(run_dir, step) if step < 30 else run_dir / f"checkpoints/step_{step:08d}", {})
    until = time.monotonic() + 60
    while tracker.run_id is None or len(models_of(client)) < 4:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert on_disk(client)[10] == "yes" and on_disk(client)[30] == on_disk(client)[40] == "no"
    shutil.rmtree(run_dir / "checkpoints/step_00000010")
    save(run_dir, 30)  # in the background; 40 cannot be written
    tracker.close()
    assert on_disk(client) == {10: "removed", 20: "yes", 30: "yes", 40: "no"}
    # Of a copy without checkpoints nothing is said.
    shutil.copytree(run_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints", "cursor.json"))
    sync(tmp_path / "copy", store)
    assert on_disk(client) == {10: "removed", 20: "yes", 30: "yes", 40: "no"}


def test_a_server_without_logged_models_is_told_once_and_gets_the_rest(tmp_path, client, store, monkeypatch):
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    class Older(mlflow.MlflowClient):
        def search_logged_models(self, *args, **kwargs):
            raise MlflowException("No API found", ENDPOINT_NOT_FOUND)

    monkeypatch.setattr(mlflow, "MlflowClient", Older)
    said = []
    tracker = start(tmp_path / "run", message=said.append)
    for step in (1, 2, 3):
        tracker.checkpoint(step, tmp_path / "run" / f"step_{step:08d}", {"loss/val": 1.0})
    tracker.tag("last", "ok")
    tracker.close()
    (run,) = runs_of(client)
    assert run.data.tags["last"] == "ok" and run.info.status == "FINISHED"
    assert len(said) == 1 and "no logged models" in said[0]
