"""Delivery to real MLflow servers: one that is killed and restarted, and one that asks for a password."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from gptoss_dist.tracking.tracker import sync
from tests.support.fork_server import free_port
from tests.support.tracked import history, runs_of, start

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@contextlib.contextmanager
def server(tmp_path, store, port, *options, **variables):
    """Run an MLflow server until the block ends, when it is killed."""
    log = tmp_path / "server.txt"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--artifacts-destination", str(tmp_path / "artifacts"), *options]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | variables,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_until_up(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def wait_until_up(url, process, log):
    """Wait until a server answers, at most two minutes."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def test_a_server_that_is_killed_in_the_middle_and_restarted_has_each_point_once(tmp_path, store, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port, said = free_port(), []
    with server(tmp_path, store, port) as uri:
        tracker = start(tmp_path / "run", uri=uri, message=said.append)
        for step in range(1, 301):  # rows are on their way when the server dies
            tracker.log(step, {"loss/train": float(step), "optim/lr": step / 1000})
            tracker.event(step, "skipped", f"step {step}")
            if tracker.run_id is None:
                time.sleep(0.05)
    for step in range(301, 401):
        tracker.log(step, {"loss/train": float(step), "optim/lr": step / 1000})
    tracker.tag("while", "down")
    with server(tmp_path, store, port) as uri:
        tracker.close(timeout=120)
        client = MlflowClient(uri)
        (run,) = runs_of(client)
        for key, scale in (("loss/train", 1), ("optim/lr", 1000)):
            assert history(client, run.info.run_id, key) == [(step, step / scale) for step in range(1, 401)]
        assert (run.info.status, run.data.tags["while"]) == ("FINISHED", "down")
    assert any("MLflow did not take the metrics" in text for text in said), said


def test_a_server_with_users(tmp_path, store, monkeypatch):
    """`mlflow server --app-name basic-auth`: nobody without a password, and a whole run with one."""
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("no Flask-WTF here, which MLflow's own authentication needs: pip install Flask-WTF")
    from mlflow import MlflowClient

    name, password = "admin", "a long password 1"
    variables = {"MLFLOW_AUTH_ADMIN_PASSWORD": password, "MLFLOW_FLASK_SERVER_SECRET_KEY": "k"}
    with server(tmp_path, store, free_port(), "--app-name", "basic-auth", **variables) as uri:
        said = []
        tracker = start(tmp_path / "run", uri=uri, message=said.append)
        tracker.log(1, {"loss/train": 1.0})
        tracker.close()
        assert said and ("401" in said[0] or "Unauthorized" in said[0] or "not authenticated" in said[0]), said
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        run_id = sync(tmp_path / "run", uri)
        assert history(MlflowClient(uri), run_id, "loss/train") == [(1, 1.0)]
