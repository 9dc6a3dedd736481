"""Run the project's commands as a user does, in one or several processes."""

import atexit
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from tests.support.fork_server import free_port

ROOT = Path(__file__).parents[2]

# A model for the `corpus` fixture that trains a step in milliseconds.
MODEL = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "max_position_embeddings": 64,
}


def command(script: str, *arguments: str, processes: int = 1, launcher: str = "torchrun") -> list[str]:
    """Return a command line for `script`: under torchrun if there are several processes, or under deepspeed."""
    if launcher == "deepspeed":
        deepspeed = Path(sys.executable).with_name("deepspeed")
        line = [str(deepspeed), "--num_gpus", str(processes), "--master_port", str(free_port())]
        return [*line, str(ROOT / script), *arguments]
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, str(ROOT / script), *arguments]


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a started process: one thread, and the project on Python's path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def run(
    script: str,
    *arguments: str,
    processes: int = 1,
    launcher: str | None = None,
    cwd: Path | None = None,
    expect: int | None = 0,
    deepspeed: bool = False,
    **extra: str,
) -> subprocess.CompletedProcess:
    """Run a script to its end.

    Args:
        script: A path, relative to the root of the project or absolute.
        arguments: The script's command line.
        processes: How many ranks the run has.
        launcher: `torchrun` or `deepspeed` starts the run as a user does. By default the fork server does.
        cwd: The working directory; by default that of the tests.
        expect: The exit code that the run must have; None allows any.
        deepspeed: Whether ranks have imported deepspeed when they begin, although no argument names it.
        extra: Variables to add to the environment.

    Raises:
        AssertionError: The run exited with another code than `expect`; the message holds its output.
    """
    if launcher is None:
        done = start(script, *arguments, processes=processes, cwd=cwd, deepspeed=deepspeed, **extra).wait()
    else:
        done = subprocess.run(
            command(script, *arguments, processes=processes, launcher=launcher),
            capture_output=True,
            text=True,
            timeout=300,
            cwd=cwd,
            env=environment(**extra),
        )
    if expect is not None and done.returncode != expect:
        raise AssertionError(f"exit code {done.returncode}, expected {expect}\n{done.stdout}\n{done.stderr}")
    return done


class Started:
    """The processes of one run that the fork server has started."""

    def __init__(self, fork_server: subprocess.Popen, job: dict) -> None:
        self.fork_server, self.job = fork_server, job
        self.processes: list[int] = self._ask(job)

    def is_running(self, rank: int = 0) -> bool:
        """Return whether a rank still runs. A process that has ended and is not waited for yet does not."""
        try:
            return Path(f"/proc/{self.processes[rank]}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def send(self, number: int = signal.SIGKILL, ranks: Iterable[int] | None = None) -> None:
        """Send a signal to all ranks, or to `ranks`."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            if self.is_running(rank):
                os.kill(self.processes[rank], number)

    def wait(self) -> subprocess.CompletedProcess:
        """Wait until all ranks have ended; end them if they take more than 300 s.

        Returns:
            The output of all ranks, and one exit code: the first that is neither 0 nor that of a rank which was ended
            because another one had failed.
        """
        codes = self._ask({"wait": self.processes})
        folder, ranks = Path(self.job["folder"]), range(len(self.processes))
        output = {s: "".join(_text(folder / f"{r}.{s}") for r in ranks) for s in ("stdout", "stderr")}
        shutil.rmtree(folder)
        failed = [code for code in codes if code not in (0, -signal.SIGTERM)]
        if len(set(failed)) > 1:
            output["stderr"] += f"\nexit codes by rank: {codes}"
        code = failed[0] if failed else min(codes)
        return subprocess.CompletedProcess([self.job["script"], *self.job["arguments"]], code, **output)

    def _ask(self, question: dict, timeout_s: float = 300.0) -> list[int]:
        self.fork_server.stdin.write(json.dumps(question) + "\n")
        self.fork_server.stdin.flush()
        if not select.select([self.fork_server.stdout], [], [], timeout_s)[0]:
            os.killpg(self.fork_server.pid, signal.SIGKILL)
            _fork_server.cache_clear()
            raise AssertionError(f"{self.job['script']} {self.job['arguments']} did not end in {timeout_s} s")
        return json.loads(self.fork_server.stdout.readline())


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""  # the rank was killed before it had opened it


def start(
    script: str, *arguments: str, processes: int = 1, cwd: Path | None = None, deepspeed: bool = False, **extra: str
) -> Started:
    """Start a run by the fork server and return at once; the arguments are those of `run`."""
    modules = ["gptoss_dist.train.loop", "gptoss_dist.parallel.parallelize", "torch._inductor.compile_fx"]
    if deepspeed or any("deepspeed" in argument or "zero_stage" in argument for argument in arguments):
        modules.append("deepspeed")
    job = {
        "script": str(ROOT / script),
        "arguments": arguments,
        "environment": environment(**extra),
        "cwd": str(cwd or Path.cwd()),
        "processes": processes,
        "folder": tempfile.mkdtemp(),
    }
    return Started(_fork_server(tuple(modules)), job)


@functools.cache
def _fork_server(modules: tuple[str, ...]) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fork_server", *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(DS_ACCELERATOR="cuda" if torch.cuda.is_available() else "cpu"),
        start_new_session=True,
    )
    atexit.register(process.kill)
    while (line := process.stdout.readline()).strip() != "ready":  # what is imported may print
        assert line, "tests/support/fork_server.py did not start"
    return process


def losses(folder: Path, name: str = "loss/train") -> dict[int, float]:
    """Return {step: value} of a metric of a run; of a step that was written twice, the last value counts."""
    from gptoss_dist.tracking.tracker import read_metrics

    return {row["step"]: row["metrics"][name] for row in read_metrics(folder) if name in row["metrics"]}
