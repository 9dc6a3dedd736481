"""MLflow's own variables: the experiment by its id, a run below another one, and what a server asks of its users."""

import base64
import datetime
import http.server
import json
import shutil
import ssl
import threading
import time
from pathlib import Path

import pytest

from gptoss_dist.tracking.children import open_child
from gptoss_dist.tracking.records import run_starts
from gptoss_dist.tracking.tracker import sync
from tests.support.tracked import history, runs_of, start


def test_the_experiment_by_its_id_and_a_run_below_another_one(tmp_path, client, store, monkeypatch):
    theirs = client.create_experiment("theirs")
    parent = client.create_run(theirs, run_name="sweep")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", theirs)
    monkeypatch.setenv("MLFLOW_PARENT_RUN_ID", parent.info.run_id)
    tracker = start(tmp_path / "run", experiment=None)
    tracker.close()
    found = client.get_run(tracker.run_id)
    assert found.info.experiment_id == theirs
    assert found.data.tags["mlflow.parentRunId"] == parent.info.run_id
    # What belongs to the run is below it, in its experiment, and not below the sweep, wherever it is made.
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    child = open_child(tmp_path / "child", tmp_path / "run", run_name="evaluation")
    child.close()
    below = client.get_run(child.run_id)
    assert (below.info.experiment_id, below.data.tags["mlflow.parentRunId"]) == (theirs, tracker.run_id)
    # A name goes before an id, and settings before both.
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", theirs)
    for given, name in ((None, "named"), ("tests", "tests")):
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "named")
        other = start(tmp_path / name, experiment=given)
        other.close()
        assert [run.info.run_id for run in runs_of(client, name)] == [other.run_id]


def test_a_child_has_ids_of_its_parent_only_on_the_server_that_gave_them(
    tmp_path, client, store, empty_store, monkeypatch
):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", theirs := client.create_experiment("theirs"))
    disk, work = tmp_path / "a/disk/run", tmp_path / "work"
    disk.mkdir(parents=True)
    work.mkdir()
    (work / "run").symlink_to(disk)  # as folders of runs often lead to a larger disk
    parent = start(work / "run", experiment=None)
    parent.close()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")
    for name, database in (("checkout", "mlflow.db"), ("alone", empty_store)):
        (tmp_path / name).mkdir()
        shutil.copy(database, tmp_path / name / "mlflow.db")
        shutil.copytree(disk, tmp_path / name / "work/run")
    shutil.copytree(disk, tmp_path / "alone/deeper/work/run")
    alone = f"sqlite:///{tmp_path}/alone/mlflow.db"
    known, unknown = (theirs, parent.run_id), (None, None)
    for number, (run_dir, cwd, uri, where, expected) in enumerate(
        [
            (work / "run", work, "", store, known),
            (disk, work, "", store, known),  # by its other name
            (work / "run", work, alone, alone, unknown),
            (work / "run", work, f"{store}?timeout=9", store, known),
            (tmp_path / "checkout/work/run", work, "", f"sqlite:///{tmp_path}/checkout/mlflow.db", known),
            (tmp_path / "alone/work/run", work, "", alone, unknown),  # the run was copied without its database
            (tmp_path / "alone/deeper/work/run", tmp_path / "alone", "", alone, unknown),
            (tmp_path / "alone/work/run", work, store, store, known),
            (work / "run", work, "http://127.0.0.1:9", "http://127.0.0.1:9", unknown),
        ]
    ):
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        folder = tmp_path / f"children/{number}"
        child = open_child(folder, run_dir, run_name="evaluation", message=lambda text: None)
        child.close(timeout=0.0 if number else 30.0)
        (begun,) = run_starts(folder)
        assert (begun.experiment_id, begun.tags.get("mlflow.parentRunId")) == expected, (run_dir, uri)
        assert (begun.experiment, begun.tags["parent_run"]) == ("gptoss_dist", "unit")
        assert json.loads((folder / "tracking/cursor.json").read_text())["uri"] == where
    monkeypatch.setenv("MLFLOW_TRACKING_URI", alone)
    taken = sync(tmp_path / "children/2")  # which an id of another server would prevent
    assert [run.info.run_id for run in runs_of(MlflowClient(alone), "gptoss_dist")] == [taken]


def test_an_unknown_id_is_told_and_can_be_corrected_later(tmp_path, client, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    said = []
    tracker = start(tmp_path / "run", experiment=None, message=said.append)
    tracker.log(1, {"loss/train": 1.0})
    tracker.close()
    assert "MLFLOW_EXPERIMENT_ID=77" in said[0] and "correct it" in said[0]
    right = client.create_experiment("right")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", right)
    run_id = sync(tmp_path / "run")
    assert client.get_run(run_id).info.experiment_id == right
    assert history(client, run_id, "loss/train") == [(1, 1.0)]


class Stub(http.server.BaseHTTPRequestHandler):
    """A server that keeps what it was asked with, and has nothing."""

    def do_GET(self):
        self.server.asked.append(self.headers.get("Authorization"))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_GET

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture
def stub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server, tmp_path, scheme="http") -> list[str]:
    """Have a tracker deliver to a stub; return what it said."""
    said = []
    uri = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    tracker = start(tmp_path / f"run{time.time()}", uri=uri, message=said.append)
    until = time.monotonic() + 30
    while not server.asked and not said and time.monotonic() < until:
        time.sleep(0.02)
    tracker.close()
    return said


def test_name_and_password_or_token_go_with_each_request(tmp_path, store, stub, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "s3cret")
    said = ask(stub, tmp_path)
    assert set(stub.asked) == {"Basic " + base64.b64encode(b"ada:s3cret").decode()}
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    stub.asked.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    said += ask(stub, tmp_path)
    assert set(stub.asked) == {"Bearer t0ken"}
    assert not any("s3cret" in text or "t0ken" in text for text in said)
    written = [path.read_bytes() for path in tmp_path.rglob("run*/**/*") if path.is_file()]
    assert written and not any(b"s3cret" in data or b"t0ken" in data for data in written)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_certificate_of_nobody_is_taken_only_where_that_is_asked_for(tmp_path, store, stub, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path / "server.pem"))
    stub.socket = context.wrap_socket(stub.socket, server_side=True)
    assert "SSL" in ask(stub, tmp_path, "https")[0] and not stub.asked
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    ask(stub, tmp_path, "https")
    assert stub.asked


def certificate(path: Path) -> Path:
    """Write a key and a certificate that nobody has signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    signed = made.sign(key, hashes.SHA256())
    private = serialization.PrivateFormat.PKCS8
    text = key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
    path.write_bytes(text + signed.public_bytes(serialization.Encoding.PEM))
    return path
