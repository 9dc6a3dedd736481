"""A real SLURM with two nodes on this machine, for tests."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ranks import ROOT

HERE = Path(__file__).parent
TOOLS = ("sbatch", "slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")


def why_not() -> str | None:
    """Why there can be no lab here, or None."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not installed"
    if os.geteuid():
        return "only root can make network namespaces"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True)
    return None if probe.returncode == 0 else "namespaces are not allowed here"


def unless_needed(reason: str) -> None:
    """Skip, or fail where SLURM_LAB_NEEDED says that the lab must be there."""
    if os.environ.get("SLURM_LAB_NEEDED"):
        pytest.fail(f"SLURM_LAB_NEEDED is set, and {reason}")
    pytest.skip(reason)


class Lab:
    """A running lab; `stop` ends all that lives in it."""

    def __init__(self) -> None:
        # A short path: a socket's has at most 108 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-lab-"))
        done = subprocess.run(["bash", HERE / "start_lab.sh", self.folder], capture_output=True, text=True, timeout=120)
        if done.returncode:
            self.stop()
            unless_needed(f"SLURM does not start here: {done.stderr[-1500:]}")

    def stop(self) -> None:
        subprocess.run(["bash", HERE / "stop_lab.sh", self.folder], timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __call__(self, *command: str | Path, cwd: Path = ROOT, code: int | None = 0, **variables: str) -> str:
        """Run a command on the controller; return its output."""
        python = Path(sys.executable)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHON": str(python), "DS_ACCELERATOR": "cpu", **variables}
        environment["PATH"] = f"{python.parent}:{environment['PATH']}"
        done = subprocess.run(
            ["bash", HERE / "in_lab.sh", self.folder, *command],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=cwd,
            env=environment,
        )
        assert code is None or done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def train(self, *words: str | Path, sbatch: tuple[str, ...] = (), **variables: str) -> str:
        """Submit launch/slurm/train.sbatch as a person does, on two nodes, and return the job's id."""
        log = f"--output={self.folder}/log/job-%A_%a.log"
        options = ("--parsable", "--nodes=2", "--gpus-per-node=1", log, *sbatch)
        return self("sbatch", *options, "launch/slurm/train.sbatch", *words, **variables).strip()

    def log_of(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted((self.folder / "log").glob(f"job-{job}_*.log")))

    def states(self, job: str) -> list[str]:
        """The states of a job, or of an array's elements that have one of their own."""
        return self("squeue", "-h", "-r", "--states=all", f"--jobs={job}", "-o", "%T").split()

    def await_step(self, run: Path, step: int, timeout_s: float = 400) -> None:
        """Wait until a run has trained a step."""
        self.await_(lambda: newest_step(run) >= step, f"step {step} of {run}", timeout_s)

    def await_(self, condition: Callable[[], bool], what: str, timeout_s: float = 400) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come in {timeout_s} s\n{self.everything()}"
            time.sleep(0.2)

    def await_restart(self, run: Path, job: str, start: int) -> None:
        """Wait until a job has begun its start of that number (0 is the first), as soon as SLURM can be hurried to.

        A requeued job waits two minutes. A node does not start it in the second in which it has killed the former
        start ("Job credential revoked"): it is hurried once it has been pending for some seconds.
        """
        pending_since, ended_at = None, None

        def begun() -> bool:
            nonlocal pending_since, ended_at
            if started(run) > start:
                return True
            now, states = time.monotonic(), set(self.states(job))
            pending_since = (pending_since or now) if "PENDING" in states else None
            if pending_since and now > pending_since + 3:
                self("scontrol", "update", f"jobid={job}", "starttime=now", code=None)
            # A job that is about to be requeued has such a state for a moment.
            ended_at = (ended_at or now) if states & {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"} else None
            assert not ended_at or now < ended_at + 20, f"job {job} has ended\n{self.everything()}"
            return False

        self.await_(begun, f"start {start} of job {job}")

    def await_end(self, job: str, *states: str, timeout_s: float = 400) -> None:
        """Wait until a job, or all elements of an array, have one of these states."""
        self.await_(lambda: set(self.states(job)) <= set(states), f"job {job} in {states}", timeout_s)

    def kill_node(self, node: str) -> None:
        """Kill the daemon of a node; what it has started lives on, as after a crash of the daemon."""
        os.kill(int((self.folder / "run" / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)

    def start_node(self, node: str) -> None:
        subprocess.run(["bash", HERE / "start_node.sh", self.folder, node], check=True, timeout=60)

    def everything(self) -> str:
        """What a person would look at if something went wrong."""
        logs = [f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted((self.folder / "log").glob("job-*"))]
        return "\n".join([self("squeue", "--states=all", code=None), *logs])


def newest_step(run: Path) -> int:
    """The last step that a run has trained, without reading lines that are not complete."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return 0
    return int(([0, *re.findall(r'^{"step": (\d+)', text, re.MULTILINE)])[-1])


def started(run: Path) -> int:
    """How many starts of its job a run has seen."""
    path = run / "starts.txt"
    return len(path.read_text().splitlines()) if path.is_file() else 0
