"""A watch over the launcher: its processes stop when it is gone, instead of training on without anybody.

SIGKILL ends torchrun before it can end its processes. The `deepspeed` command passes no signal on at all: it starts
`deepspeed.launcher.launch`, and that starts the processes. Whoever started the run again would meet the old processes
in its folder. So each process looks for its launcher among its ancestors, and asks now and then whether it still lives:

    torchrun -> train.py                                        watched: torchrun
    deepspeed -> deepspeed.launcher.launch -> train.py          watched: both

A process whose launcher has gone is treated as torchrun treats it when torchrun is asked to end: it gets SIGTERM, upon
which a run finishes its step and saves, and SIGKILL some time later. srun and mpirun clean up on their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from gptoss_dist.distributed import launchers
from gptoss_dist.distributed.hosts import machine

GRACE_S = 30.0
"""Seconds between SIGTERM and SIGKILL, unless torchrun's variable TORCH_ELASTIC_SHUTDOWN_TIMEOUT gives others."""
_INTERVAL_S = 0.5
_LAUNCHERS = {
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
}


def end_with_launcher() -> None:
    """Watch the launcher of this process from now on, in a thread; without a launcher, do nothing."""
    if chain := _ancestors_to_launcher():
        threading.Thread(target=_watch, args=(chain,), name="launcher-watch", daemon=True).start()


def launcher() -> str | None:
    """Return what no other launcher has, of this process's outermost one; None without a launcher."""
    chain = _ancestors_to_launcher()
    return f"{machine()} {chain[-1][0]} {chain[-1][1]}" if chain else None


def _watch(chain: list[tuple[int, str]]) -> None:
    while all(started(process) == start for process, start in chain):
        time.sleep(_INTERVAL_S)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        text = f"{launchers.program()}: the launcher of this run has ended (process {chain[-1][0]}); stopping too"
        with contextlib.suppress(OSError):  # whoever reads it may be gone as well
            print(text, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_grace_s())
    os.kill(os.getpid(), signal.SIGKILL)


def _grace_s() -> float:
    try:
        return max(0.0, float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE_S)))
    except ValueError:
        return GRACE_S


def _ancestors_to_launcher() -> list[tuple[int, str]]:
    """Return the ancestors of this process, up to the outermost launcher, each with its time of start."""
    ancestors, length, process = [], 0, os.getppid()
    while process > 0 and (start := started(process)) is not None:
        ancestors.append((process, start))
        if _is_launcher(process):
            length = len(ancestors)
        process = _parent(process)
    return ancestors[:length]


def _is_launcher(process: int) -> bool:
    try:
        words = os.fsdecode(Path(f"/proc/{process}/cmdline").read_bytes()).split("\0")
    except OSError:
        return False
    return program_of(words) in _LAUNCHERS


def program_of(words: list[str]) -> str:
    """Return what a command line runs: its first word, or Python's script or module, without the folder.

    Of `bash start.sh deepspeed` that is `bash`, of `python -u -m torch.distributed.run` it is `torch.distributed.run`.
    """
    first, *rest = words or [""]
    if not os.path.basename(first).startswith(("python", "pypy")):
        return os.path.basename(first)
    left = iter(rest)
    for word in left:
        if word == "-m":
            return next(left, "")
        if word in ("-X", "-W"):
            next(left, None)
        elif not word.startswith("-"):
            return os.path.basename(word)
    return ""


def _stat(process: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat behind the name, or None if the process has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields


def _parent(process: int) -> int:
    fields = _stat(process)
    return int(fields[1]) if fields else 0


def started(process: int) -> str | None:
    """Return when a process started, in clock ticks since boot, so that one with its id later is not taken for it."""
    fields = _stat(process)
    return fields[19] if fields else None
