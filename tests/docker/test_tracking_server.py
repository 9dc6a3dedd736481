"""The services of docker/compose.yaml by their own commands, without Docker: 20 runs at once lose no point."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from gptoss_dist.tracking.tracker import read_metrics
from tests.docker import compose, postgres
from tests.docker.log_points import METRICS
from tests.support.fork_server import free_port
from tests.support.ranks import command, environment

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RUNS, STEPS = 20, 200
PAGE = "https://curves.example.org"
"""Where a proxy shows the server to browsers."""
START_LIMIT_S, LOG_LIMIT_S = 180, 600


class Server:
    """A running MLflow server, asked by its REST API as any other program does."""

    def __init__(self, port: int, folder: Path) -> None:
        self.uri, self.folder, self._port = f"http://127.0.0.1:{port}", folder, port

    def wait(self, process: subprocess.Popen) -> None:
        """Wait until the service's own health check passes."""
        (*_, code) = compose.services(POSTGRES_PASSWORD="x")["mlflow"]["healthcheck"]["test"]
        check = [sys.executable, "-c", code.replace(":5000/", f":{self._port}/")]
        limit = time.monotonic() + START_LIMIT_S
        while subprocess.run(check, capture_output=True).returncode:
            if process.poll() is not None or time.monotonic() > limit:
                pytest.fail(f"the server does not answer: {(self.folder / 'log.txt').read_text()[-3000:]}")
            time.sleep(0.5)

    def ask(self, path: str, question: dict | None = None, **headers: str) -> dict:
        """Return the answer to a GET, or to a POST of a question."""
        body = None if question is None else json.dumps(question).encode()
        headers = {"Content-Type": "application/json"} | headers
        request = urllib.request.Request(f"{self.uri}/api/2.0/mlflow{path}", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def runs(self, experiment: str) -> dict[str, dict]:
        """Return an experiment's runs by name."""
        found = self.ask(f"/experiments/get-by-name?experiment_name={urllib.request.quote(experiment)}")
        number = found["experiment"]["experiment_id"]
        runs = self.ask("/runs/search", {"experiment_ids": [number], "max_results": 1000})["runs"]
        assert len({run["info"]["run_name"] for run in runs}) == len(runs)
        return {run["info"]["run_name"]: run for run in runs}

    def points(self, run: dict, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of all points of a metric, in the order of steps."""
        path = f"/metrics/get-history?run_id={run['info']['run_id']}&metric_key={urllib.request.quote(key, safe='')}"
        return sorted((int(point["step"]), point["value"]) for point in self.ask(path).get("metrics", []))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The server of compose.yaml: its command, with the machine's ports, its own database and its own folder."""
    if postgres.programs() is None:
        pytest.skip("no Postgres here: apt-get install postgresql")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("no driver for Postgres here: pip install -c launch/constraints.txt psycopg2-binary")
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with postgres.running() as database:
        service = compose.services(POSTGRES_PASSWORD=postgres.PASSWORD, MLFLOW_ALLOWED_ORIGINS=PAGE)["mlflow"]
        replaced = {
            "@postgres:5432": f"@127.0.0.1:{database}",
            "=5000": f"={port}",
            "=/artifacts": f"={folder}/artifacts",
        }
        line = service["command"]
        for before, after in replaced.items():
            assert sum(before in word for word in line) == 1
            line = [word.replace(before, after) for word in line]
        log = folder / "log.txt"
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(line[0])), *line[1:]],
            cwd=folder,
            env=os.environ | service["environment"],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            started = Server(port, folder)
            started.wait(process)
            yield started
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # asked to end, it takes half a minute on a busy machine
            process.wait(30)


def test_twenty_runs_at_once_lose_no_point(server, corpus, settings, tmp_path):
    at_once = [sys.executable, str(Path(__file__).with_name("log_points.py")), str(tmp_path), str(RUNS), str(STEPS)]
    trained = [
        command(
            *("launch/train.py", "--config", str(settings), "--tracking.mlflow", "true"),
            *("--run.name", name, "--run.dir", str(tmp_path / name)),
        )
        for name in ("one", "two")
    ]
    variables = environment(MLFLOW_TRACKING_URI=server.uri)
    started = [subprocess.Popen(line, env=variables, cwd=tmp_path) for line in (at_once, *trained)]
    assert [process.wait(LOG_LIMIT_S) for process in started] == [0, 0, 0]

    runs = server.runs("at once")
    assert set(runs) == {f"run{number}" for number in range(RUNS)}
    for number in range(RUNS):
        run = runs[f"run{number}"]
        assert run["info"]["status"] == "FINISHED"
        for key in METRICS:
            assert server.points(run, key) == [(step, number + step / 1000) for step in range(1, STEPS + 1)]
        (note,) = (server.folder / "artifacts").glob(f"*/{run['info']['run_id']}/artifacts/notes/note.txt")
        assert note.read_text() == "hello"
        assert run["info"]["artifact_uri"].startswith("mlflow-artifacts:/")  # not the client's disk

    runs = server.runs("gptoss_dist")
    for name in ("one", "two"):
        recorded = [(row["step"], row["metrics"].get("loss/train")) for row in read_metrics(tmp_path / name)]
        rows = [(step, loss) for step, loss in recorded if loss is not None]
        assert len(rows) == 12 and server.points(runs[name], "loss/train") == rows


def test_the_server_knows_its_names_and_no_others(server):
    """Services ask for `mlflow:5000`; another name is how a page in a browser would get at a server inside."""
    experiments = "/experiments/search?max_results=1"
    assert server.ask(experiments, Host="mlflow:5000")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        server.ask(experiments, Host="elsewhere.example.org")


def test_pages_of_named_origins_may_ask_by_post_and_no_others(server):
    """As MLflow's own page searches for runs, and as another page would change some."""
    question = ("/experiments/search", {"max_results": 1})
    for origin in (PAGE, "http://localhost:5000"):
        assert server.ask(*question, Origin=origin)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        server.ask(*question, Origin="https://elsewhere.example.org")
