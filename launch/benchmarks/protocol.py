"""What the benchmarks of this folder have in common.

What is compared takes turns, so that all of it meets the same machine; rounds repeat the turns. A figure is the median
over the rounds, and a comparison is the median of the ratios within each round, each given with the least and the most
that were seen. Every turn, or at least everything that is compared, has processes of its own, so that none inherits
another's memory. A worker process prints what it found as JSON, on the last line of its output.

Each turn says on standard error what it found, as soon as it has; results are on standard output, at the end. Every
benchmark has `--quick`, sizes that end in minutes on any CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
"""The run whose model and settings the benchmarks start from."""


@dataclass(frozen=True)
class Spread:
    """The median of some values, with the least and the most of them."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_ratios(cls, above: Iterable[float], below: Iterable[float]) -> "Spread":
        """Compare two things round by round: `above` and `below` hold one value for each round."""
        return cls.of(a / b for a, b in zip(above, below, strict=True))

    def range(self, form: str) -> str:
        """Return the least and the most, each in a format such as ".2f"."""
        return f"{self.least:{form}} to {self.most:{form}}"

    def __format__(self, form: str) -> str:
        return f"{self.median:{form}} ({self.range(form)})"


def torchrun(processes: int) -> list[str]:
    """Return the beginning of a command line that launches a script in `processes` processes on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def environment(threads: int, **others: str) -> dict[str, str]:
    """Return the environment of a worker process that computes with `threads` CPU threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), **others}


def add_quick(parser: argparse.ArgumentParser, argv: list[str], **sizes: float | str) -> None:
    """Give a parser the option `--quick`, which changes the defaults of others.

    Args:
        parser: It has the options already.
        argv: The command line that will be parsed.
        **sizes: The defaults that `--quick` sets, by the options' names.
    """
    listed = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in sizes.items())
    parser.add_argument("--quick", action="store_true", help=f"rougher, in minutes on any CPU: {listed}")
    if "--quick" in argv:
        parser.set_defaults(**sizes)


def progress(text: str) -> None:
    """Say on standard error what is known by now; also from a worker, whose line `run_worker` passes on."""
    print(f"{_PROGRESS}{text}", file=sys.stderr, flush=True)


_PROGRESS = "benchmark: "


def rounds(count: int) -> Iterator[int]:
    """Count rounds from 0, and say after each how long the others will take if they are like it."""
    begin = time.perf_counter()
    before = begin
    for done in range(1, count + 1):
        yield done - 1
        now = time.perf_counter()
        # The first one starts processes and warms up: the others take less.
        bound = "at most" if done == 1 else "about"
        left = f"; {bound} {(now - before) * (count - done):.0f} s to go" if done < count else ""
        progress(f"{done} of {count} rounds after {now - begin:.0f} s{left}")
        before = now


def start_worker(command: list[str], threads: int) -> subprocess.Popen:
    """Start a Python script that takes its turns when `turn` asks for them, on the CPU and without a network."""
    env = environment(threads, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )


def turn(worker: subprocess.Popen, number: int) -> dict:
    """Send a number to a worker, such as how many steps it is to take, and return what it found."""
    worker.stdin.write(f"{number}\n")
    worker.stdin.flush()
    while line := worker.stdout.readline():
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("benchmark.py: a worker ended early; its error is above")


def run_worker(name: str, command: list[str], env: dict[str, str] | None = None) -> dict:
    """Run a command to its end, and return what it found. Its lines of progress are passed on as they come.

    Args:
        name: What is measured, for the error.
        command: The command line.
        env: Its environment; this process's if it is None.

    Raises:
        SystemExit: The command failed. The end of its errors is in the message.
    """
    errors: deque[str] = deque(maxlen=60)

    def read_errors() -> None:
        for line in process.stderr:
            if line.startswith(_PROGRESS):
                print(line, end="", file=sys.stderr, flush=True)
            else:
                errors.append(line)

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        reader = threading.Thread(target=read_errors)
        reader.start()
        output = process.stdout.read()
        reader.join()
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{''.join(errors)[-3000:]}")
    return json.loads(output.splitlines()[-1])
