"""Finds a Python program that can do the proof, and installs one only where none is found. Standard library only."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.benchmarks.prove_gpu.bounded import run_bounded
from launch.benchmarks.prove_gpu.findings import ROOT

PROBE_S = 90.0


@dataclass(frozen=True)
class Python:
    """A Python program, and what it has."""

    path: str
    version: str
    versions: dict[str, str]
    missing: list[str]
    cuda: dict | None
    """What torch says of the first GPU; None if it sees none."""

    def why_not(self, rehearse: bool) -> str | None:
        """Return what it lacks for the proof, or None if nothing."""
        if self.missing:
            return f"lacks {', '.join(self.missing)}"
        if not rehearse and self.cuda is None:
            return f"its torch {self.versions['torch']} sees no GPU"
        return None


def candidates() -> list[str]:
    """Return the programs that may do: of the active environment, of `.venv`, and the one that `python3` is."""
    folders = [os.environ.get("VIRTUAL_ENV"), ROOT / ".venv"]
    paths = [str(Path(folder) / "bin/python") for folder in folders if folder]
    return list(dict.fromkeys(path for path in (*paths, sys.executable) if os.access(path, os.X_OK)))


def probe(path: str, env: dict[str, str], seconds: float = PROBE_S) -> Python | None:
    """Return what a program has; None if it does not answer."""
    try:
        done = subprocess.run(
            [path, str(Path(__file__).with_name("probe.py"))],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=env,
            timeout=seconds,
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError):
        return None
    return Python(path, found["python"], found["versions"], found["missing"], found["cuda"])


def find_python(
    env: dict[str, str], log: Path, *, rehearse: bool, install: bool, seconds: float
) -> tuple[Python | None, str]:
    """Return a program for the items, and one line on how it was found.

    What is there is used as it is. If nothing that is there is good enough, `launch/install.sh` completes the active
    environment, or `.venv`; it keeps a torch that it finds. If that fails, as without a network, the best of what is
    there has to do: items that need more than it has will fail, and say so.

    Args:
        env: The environment of the items.
        log: A file for what the installation prints.
        rehearse: Whether a GPU is not needed.
        install: Whether anything may be installed.
        seconds: How long the installation may take.
    """
    found = [python for path in candidates() if (python := probe(path, env)) is not None]
    for python in found:
        if python.why_not(rehearse) is None:
            return python, f"{python.path} has all that is needed"
    reasons = "; ".join(f"{python.path} {python.why_not(rehearse)}" for python in found) or "no Python with torch"
    if install:
        command = ["sh", str(ROOT / "launch/install.sh"), "--extras", "test"]
        code = run_bounded(command, log, env, ROOT, seconds)
        target = os.environ.get("VIRTUAL_ENV") or str(ROOT / ".venv")
        python = probe(str(Path(target) / "bin/python"), env)
        if code == 0 and python is not None and python.why_not(rehearse) is None:
            return python, f"installed into {target}, because {reasons}"
        how = f"took over {seconds:.0f} s" if code is None else f"ended with exit code {code}"
        reasons += f"; launch/install.sh {how}"
    usable = [p for p in found if "torch" in p.versions and (rehearse or p.cuda is not None)]
    if usable:
        best = min(usable, key=lambda python: len(python.missing))
        return best, f"{best.path} has to do: {reasons}"
    return None, reasons
