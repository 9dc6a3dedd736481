"""Two hosts that share a folder: torchrun over a cable that is cut, a rank that dies, a host that never arrives."""

import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.support.netns import Hosts, kill_matching, wait_for, why_not
from tests.support.ranks import ROOT, losses

pytestmark = [pytest.mark.netns, pytest.mark.distributed]

SCRIPT = """
import os, sys, time

from data_pipeline import ownership
from gptoss_dist.distributed.processes import init_distributed
from gptoss_dist.train import loop
from launch.train import main

limit_s, slow = float(os.environ["LIMIT_S"]), os.environ["SLOW"]
ownership.HEARTBEAT_S, ownership.STALE_AFTER_S = 0.5, 5.0
learning_rate = loop.learning_rate

def learning_rate_in_time(*arguments):
    if os.path.exists(slow):
        time.sleep(0.2)
    return learning_rate(*arguments)

loop.init_distributed = lambda *arguments, **options: init_distributed(timeout_s=limit_s)
loop.learning_rate = learning_rate_in_time
sys.exit(main(sys.argv[1:]))
"""
"""A training run with short time limits, whose steps take long while a file is there."""


@pytest.fixture
def hosts(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(2, tmp_path) as hosts:
        yield hosts


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "brief.py"
    path.write_text(SCRIPT)
    return path


class Launch:
    """One launcher on each of two hosts, their output, and the run that they train."""

    def __init__(self, hosts: Hosts, folder: Path, **variables: str) -> None:
        self.hosts, self.folder, self.run = hosts, folder, folder / "run"
        self.slow = folder / "slow"
        self.slow.touch()
        self.variables = {"LIMIT_S": "10", "SLOW": str(self.slow), **variables}
        self.processes = {}

    def start(self, host: str, command: list[str], **variables: str) -> None:
        output = self.folder / f"{host}.txt"
        self.processes[host] = self.hosts.start(host, command, output, **self.variables, **variables)

    def output(self, host: str) -> str:
        return (self.folder / f"{host}.txt").read_text()

    def said(self, host: str) -> list[str]:
        """Return what the run itself has said to the user on a host."""
        return [line.rpartition("train.py: ")[2] for line in self.output(host).splitlines() if "train.py: " in line]

    def resumed(self) -> int:
        """Return how often the run was resumed."""
        return sum(self.output(host).count("resumed ") for host in self.processes)

    def has_named(self, host: str, other: str) -> bool:
        """Return whether a host has said that it lost another one."""
        return any(f"on {host} lost" in line and other in line.split("): ")[0] for line in self.said(host))

    def everything(self) -> str:
        return "\n".join(f"--- {host}\n{self.output(host)[-6000:]}" for host in self.processes)

    def step(self) -> int:
        return max(losses(self.run), default=0) if (self.run / "metrics.jsonl").is_file() else 0

    def wait_for(self, condition, seconds: float) -> None:
        wait_for(condition, seconds, self.everything)

    def exit_codes(self, seconds: float) -> list[int]:
        self.wait_for(lambda: all(process.poll() is not None for process in self.processes.values()), seconds)
        return [process.returncode for process in self.processes.values()]


def options(settings: Path, folder: Path) -> list[str]:
    return shlex.split(
        f"--config {settings} --run.dir {folder / 'run'} --resume auto --train.steps 200 --checkpoint.every 10 "
        "--validation.every 0"
    )


@pytest.mark.slow
def test_a_dead_rank_is_replaced_and_a_cut_cable_outlived(hosts, script, settings, tmp_path):
    """Both hosts say who is missing, and the run goes on from its last checkpoint when the cable is back."""
    launch = Launch(hosts, tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    line = [
        sys.executable,
        *shlex.split(
            "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --max-restarts 5 --rdzv-backend c10d "
            f"--rdzv-endpoint node1:29500 --rdzv-id run --monitor-interval 1 {script}"
        ),
        *options(settings, tmp_path),
    ]
    for host in hosts.names:
        launch.start(host, line)
    launch.wait_for(lambda: launch.step() >= 12, 120)

    assert len(kill_matching(launch.processes["node2"].pid, str(script))) == 1
    began, step = time.monotonic(), launch.step()
    launch.wait_for(lambda: launch.resumed() == 1 and launch.step() > step + 5, 120)
    print(f"a killed rank was replaced, and its step passed, within {time.monotonic() - began:.0f} s")

    hosts.cut("node2")
    began = time.monotonic()
    launch.wait_for(lambda: launch.has_named("node1", "node2") and launch.has_named("node2", "node1"), 60)
    print(f"both hosts have named the other {time.monotonic() - began:.0f} s after the cut, with a limit of 10 s")
    time.sleep(10)
    hosts.mend("node2")
    began = time.monotonic()
    launch.wait_for(lambda: launch.resumed() > 1, 180)
    print(f"the run went on {time.monotonic() - began:.0f} s after the cable was back")
    launch.slow.unlink()
    assert launch.exit_codes(180) == [0, 0], launch.everything()
    assert sorted(losses(launch.run)) == list(range(1, 201))
    assert not list(launch.run.glob(".owner-*"))


def srun(rank: int) -> dict[str, str]:
    """The variables of one of two tasks that srun has started on two nodes."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "node[1-2]",
    }


def test_a_host_that_never_arrives_is_named(hosts, script, settings, tmp_path):
    """It has started, and its cable is out: each of the two says what it misses, and ends."""
    launch = Launch(hosts, tmp_path)
    hosts.cut("node2")
    for rank, host in enumerate(hosts.names):
        launch.start(host, [sys.executable, str(script), *options(settings, tmp_path)], **srun(rank))
    assert launch.exit_codes(90) == [2, 2]
    (waits, missing), (_, unreached) = launch.said("node1"), launch.said("node2")
    assert "rank 0 on node1 waits at node1:20700 (MASTER_ADDR:MASTER_PORT) for 1 of 2 ranks, node2 (rank 1)" in waits
    assert "1 of 2 ranks, node2 (rank 1), did not come to node1:20700" in missing
    assert "rank 1 on node2 did not reach rank 0 at node1:20700" in unreached
    assert not launch.run.exists()


def test_a_host_with_other_code_is_named(hosts, script, settings, tmp_path):
    """Its copy of the code is a line longer."""
    launch, copy = Launch(hosts, tmp_path), tmp_path / "copy"
    for package in ("data_pipeline", "gptoss_dist", "launch"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "gptoss_dist/model/rope.py").open("a") as file:
        file.write("# one more line\n")
    for rank, (host, root) in enumerate((("node1", ROOT), ("node2", copy))):
        line = [sys.executable, str(script), *options(settings, tmp_path)]
        launch.start(host, line, **srun(rank), PYTHONPATH=str(root))
    assert launch.exit_codes(90) == [2, 2], launch.everything()
    for host in hosts.names:
        (said,) = launch.said(host)
        assert said.startswith("node2 (rank 1) has other code than node1 (rank 0): "), said
        assert "the digest of the sources is " in said and "install the same version on all machines" in said
    assert not launch.run.exists()
