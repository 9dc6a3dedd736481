"""What the benchmarks of this folder have in common.

What is compared takes turns, so that all of it meets the same machine; rounds repeat the turns. A figure is the median
over the rounds, and a comparison is the median of the ratios within each round, each given with the least and the most
that were seen. Every turn, or at least everything that is compared, has processes of its own, so that none inherits
another's memory. A worker process prints what it found as JSON, on the last line of its output.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
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


def run_worker(name: str, command: list[str], env: dict[str, str] | None = None) -> dict:
    """Run a command to its end, and return what it found.

    Args:
        name: What is measured, for the error.
        command: The command line.
        env: Its environment; this process's if it is None.

    Raises:
        SystemExit: The command failed. The end of its errors is in the message.
    """
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
