"""Runs a command in a process group of its own, for so many seconds and no longer. Standard library only."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_LIBC = ctypes.CDLL(None)


def run_bounded(command: list[str], log: Path, env: dict[str, str], cwd: Path, seconds: float) -> int | None:
    """Run a command to its end or for `seconds`; then its whole process group is killed.

    The group is killed as well if this process is interrupted by an exception, and its first process if this one is
    killed, so that nothing keeps the device after a proof has ended, however it ended.

    Args:
        command: The command line.
        log: A file to append its output to.
        env: Its environment.
        cwd: Its working directory.
        seconds: How long it may take.

    Returns:
        The exit code, or None if the time was up.
    """
    deadline = time.monotonic() + seconds
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=cwd,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    in_time = False
    try:
        # WNOWAIT leaves an ended process its number, so that the group that is killed can be no other.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        else:
            in_time = True
    finally:
        # Always: what an ended command left behind would hold memory of the device too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode if in_time else None


def _die_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
