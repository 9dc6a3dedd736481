"""Exports in MLflow's registry."""

import json

import pytest

from gptoss_dist.tracking.delivery.registry import register_export
from launch.convert import ExportOptions
from tests.support.tracked import start


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "my-export"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64, "rope_scaling": {"factor": 2}}))
    (folder / "model.safetensors").write_bytes(b"heavy")
    return folder


@pytest.mark.heavy
def test_an_export_becomes_a_version_of_its_run_with_and_without_its_files(tmp_path, client, store, export):
    tracker = start(tmp_path / "run")
    tracker.close()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    said = register_export("ours", export, checkpoint)
    assert "ours, version 1" in said and f"its files stay in {export}" in said
    said = register_export("ours", export, tmp_path / "run", upload=True)
    assert "ours, version 2" in said and "with its files" in said
    found = {version.version: version for version in client.search_model_versions("name = 'ours'")}
    assert {number: version.tags["files"] for number, version in found.items()} == {1: "not uploaded", 2: "uploaded"}
    for number, files in ((1, []), (2, ["config.json", "model.safetensors"])):
        version = found[number]
        assert version.run_id == tracker.run_id and version.tags["path"] == str(export)
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        assert model.params == {"hidden_size": "64"} and model.source_run_id == tracker.run_id
        assert [item.path for item in client.list_logged_model_artifacts(model.model_id)] == files


def test_weights_of_no_run_are_registered_too_and_a_server_that_is_not_there_is_named(
    tmp_path, client, store, export, monkeypatch
):
    assert "theirs, version 1" in register_export("theirs", export, "some/hf-folder")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # which mlflow has set for this process
    # Of a run whose server is known without its password nothing is sent anywhere.
    start(tmp_path / "run", uri="http://me:secret@127.0.0.1:9", enabled=False).close()
    with pytest.raises(
        ValueError, match=r"not registered: .* without its secrets, http://\*\*\*@127\.0\.0\.1:9: give it"
    ):
        register_export("theirs", export, tmp_path / "run")
    # A server that takes no id of this form does not have the run.
    cursor = json.loads((tmp_path / "run/tracking/cursor.json").read_text()) | {"run_id": "x" * 40}
    (tmp_path / "run/tracking/cursor.json").write_text(json.dumps(cursor))
    assert "theirs, version 2" in register_export("theirs", export, tmp_path / "run", uri=store)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ValueError, match=r"is exported, but not registered in MLflow at http://127\.0\.0\.1:9"):
        register_export("theirs", export, "some/hf-folder", uri="http://127.0.0.1:9")


@pytest.mark.parametrize("options", [{"register": "a/b"}, {"register": " "}, {"upload": True}, {"uri": "x"}])
def test_options_that_make_no_sense_are_refused_before_anything_is_written(options):
    with pytest.raises(ValueError, match=r"register"):
        ExportOptions(source="x", output="y", **options)
