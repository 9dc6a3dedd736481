"""Ray on two nodes prepares the same bytes, whatever is killed on the way."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from data_pipeline import open_source
from data_pipeline.prepare.on_ray import _await_arrival
from data_pipeline.prepare.part import PreparedPart
from tests.support.prepared import contents, run
from tests.support.ranks import ROOT

pytest.importorskip("ray")
pytestmark = pytest.mark.distributed

# It takes long enough to be killed on the way, and leaves a line for each part that is begun.
SLOW_FILTER = """
import os, time

def keep(text):
    time.sleep(0.004)
    if text.startswith("part "):
        with open(os.environ["BEGUN"], "a") as file:
            file.write(text + "\\n")
    return True
"""
PARTS = 8


class Cluster:
    """Two nodes of Ray on this machine, with a processor each."""

    def __init__(self, folder: Path) -> None:
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a" * 64,
            "RAY_USAGE_STATS_ENABLED": "0",
            "BEGUN": str(folder / "begun"),
            "PYTHONPATH": str(ROOT),
        }
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        # A socket's path has at most 107 bytes.
        self.temporary = Path("/tmp") / f"ray-test-{os.getpid()}"
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={self.temporary}"]
        self.nodes = [self._start(*head)]
        self.environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        self.nodes.append(self._start(f"--address=127.0.0.1:{port}"))

    def _start(self, *options: str) -> subprocess.Popen:
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        line += ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--disable-usage-stats", "--block"]
        return subprocess.Popen(line, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def await_nodes(self, count: int) -> None:
        program = "import ray; ray.init(logging_level='ERROR'); print(sum(node['Alive'] for node in ray.nodes()))"
        deadline = time.monotonic() + 120
        while True:
            line = [sys.executable, "-c", program]
            done = subprocess.run(line, env=self.environment, capture_output=True, text=True)
            if done.stdout.strip() == str(count):
                return
            assert time.monotonic() < deadline, done.stderr
            time.sleep(0.5)

    def workers(self) -> list[psutil.Process]:
        return [
            p for p in psutil.process_iter() if "_prepare_on_worker" in "".join(p.cmdline() if p.is_running() else [])
        ]

    @staticmethod
    def kill(node: subprocess.Popen) -> None:
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            process.kill()
        node.wait()

    def stop(self) -> None:
        for node in self.nodes:
            if node.poll() is None:
                self.kill(node)
        shutil.rmtree(self.temporary, ignore_errors=True)


def forget_other_filter(monkeypatch):
    """Let the module of another test, of the same name, not be found."""
    monkeypatch.delitem(sys.modules, "filter_for_ray", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def cluster(tmp_path):
    started = Cluster(tmp_path)
    try:
        started.await_nodes(2)
        yield started
    finally:
        started.stop()


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The options of a request with a filter, in eight parts of a second each."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(PARTS):
        texts = open_source(f"synthetic:documents=250,seed={index}").documents()
        lines = [json.dumps({"text": text}) for text in (f"part {index}", *texts)]
        (folder / f"{index}.jsonl").write_text("\n".join(lines))
    (tmp_path / "filter_for_ray.py").write_text(SLOW_FILTER)
    forget_other_filter(monkeypatch)
    monkeypatch.setenv("BEGUN", str(tmp_path / "begun_before"))
    options = shlex.split("--filter filter_for_ray:keep --shard-tokens 20000 --tokenizer bytes")
    return [folder, "--allow-code", tmp_path / "filter_for_ray.py", *options]


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_node_cost_their_parts(tmp_path, command, cluster):
    assert run(*command, "--output", tmp_path / "whole", "--workers", 2) == 0
    expected = contents(tmp_path / "whole")
    line = [sys.executable, "-m", "data_pipeline.prepare", *command, "--output", tmp_path / "data", "--executor", "ray"]
    begun = tmp_path / "begun"
    process = subprocess.Popen(
        list(map(str, line)),
        env=cluster.environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def await_begun(count: int) -> None:
        deadline = time.monotonic() + 120
        while not begun.exists() or len(begun.read_text().splitlines()) < count:
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.02)

    await_begun(2)
    os.kill(cluster.workers()[0].pid, signal.SIGKILL)
    await_begun(4)
    cluster.kill(cluster.nodes[1])
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert "2 processors on 2 machines" in said
    assert contents(tmp_path / "data") == expected
    assert not list(tmp_path.glob("*.preparing"))
    counted = Counter(begun.read_text().splitlines())
    assert len(counted) == PARTS and PARTS < counted.total() <= PARTS + 3, counted


def test_ray_on_this_machine_writes_the_same_bytes(tmp_path, corpus, monkeypatch):
    """In a process of its own, which a thread of Ray's would change for other tests."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("BEGUN", str(tmp_path / "begun"))
    (tmp_path / "filter_for_ray.py").write_text(SLOW_FILTER)
    forget_other_filter(monkeypatch)
    sources = [corpus, "synthetic:documents=90,seed=4", "--allow-code", tmp_path / "filter_for_ray.py"]
    options = [*sources, "--filter", "filter_for_ray:keep", "--shard-tokens", 20_000, "--max-documents", 450]
    assert run(*options, "--output", tmp_path / "one") == 0
    line = [sys.executable, "-m", "data_pipeline.prepare", *options, "--output", tmp_path / "ray", "--executor", "ray"]
    for _ in range(3):
        done = subprocess.run([*map(str, line), "--workers", "2"], cwd=ROOT, capture_output=True, text=True)
        if "timed out during startup" not in done.stderr:  # Ray gives itself 30 s, too few for a very busy machine
            break
    assert done.returncode == 0, done.stderr
    assert "Ray on this machine, as RAY_ADDRESS is not set: 2 processors on 1 machines" in done.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "ray")
    assert not list(tmp_path.glob("*.preparing"))


def test_a_part_that_does_not_arrive_is_one_line(tmp_path, monkeypatch):
    """A machine that has a folder of its own under the same path."""
    monkeypatch.setattr("data_pipeline.prepare.on_ray._ARRIVAL_S", 0.1)
    part = PreparedPart("0" * 32, "a.jsonl", 1, 1, {}, {}, {}, 0, [], {})
    with pytest.raises(ValueError, match=r"a part that another machine has prepared \(a\.jsonl\) does not appear here"):
        _await_arrival(tmp_path, part)


def test_no_ray_is_one_line(tmp_path, monkeypatch, capsys):
    options = ["synthetic:documents=20", "--output", tmp_path / "data", "--executor", "ray"]
    for address, reason in (("127.0.0.1:1", "Connection refused"), ("no.such.host.invalid:6379", "gaierror")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        code, _, err = run(*options, capsys=capsys)
        assert code == 2 and f"no connection to Ray, RAY_ADDRESS={address}: " in err and reason in err
        assert err.count("\n") == 1 and list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run(*options, capsys=capsys)
    assert code == 2 and err == "error: --executor ray: Ray is not installed; sh launch/install.sh --extras ray\n"
    assert list(tmp_path.iterdir()) == []
