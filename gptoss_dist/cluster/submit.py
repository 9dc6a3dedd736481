"""Handing a script to SLURM, and following a job's log."""

from __future__ import annotations

import codecs
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
"""States that a job does not leave any more. A job that requeues itself is PENDING again."""
MOST_BETWEEN_QUESTIONS_S = 30.0
"""Its manual asks programs not to call squeue in short loops, as each call burdens the controller."""
MOST_SILENCE_S = 600.0
"""A controller that restarts is given so long."""


def submit(script: Path) -> str:
    """Submit a script, and return the job's id.

    Raises:
        ValueError: There is no SLURM here, or it refuses the job.
    """
    return _ask("sbatch", "--parsable", str(script)).split(";")[0].strip()


def follow(job: str, log: Path, write: Callable[[str], None], interval_s: float = 2.0) -> str:
    """Hand over what is added to a job's log until the job has ended for good, and return its last state.

    Args:
        job: The job's id.
        log: Its log, which appears when the job starts.
        write: Takes each new part of the log.
        interval_s: Seconds between two looks at the log. SLURM is asked for the job's state after one, two, four, ...
            of them, up to `MOST_BETWEEN_QUESTIONS_S`.

    Raises:
        ValueError: SLURM has not answered for `MOST_SILENCE_S`.
    """
    offset, state, ended = 0, "PENDING", False
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")  # a part may end within a character
    answered, next_question, pause_s = time.monotonic(), 0.0, interval_s
    while True:
        if (now := time.monotonic()) >= next_question:
            next_question, pause_s = now + pause_s, min(2 * pause_s, MOST_BETWEEN_QUESTIONS_S)
            try:
                found = state_of(job)
            except ValueError:
                if now - answered > MOST_SILENCE_S:
                    raise
            else:
                ended = found is None or found in _ENDED  # asked before the log is read: nothing comes after that
                state, answered = found or state, now
        if log.is_file():
            with open(log, "rb") as file:
                file.seek(offset)
                part = file.read()
            offset += len(part)
            if part:
                write(decoder.decode(part))
        if ended:
            return state
        time.sleep(interval_s)


def state_of(job: str) -> str | None:
    """Return the state of a job, such as RUNNING, or None if SLURM has forgotten it.

    Raises:
        ValueError: SLURM does not answer.
    """
    try:
        return _ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip() or None
    except ValueError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]} is not on this machine; run this on a login node of the cluster, or add --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} did not answer within 120 s; try again") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ValueError(f"{command[0]} refused: {said.removeprefix(f'{command[0]}: error: ')}")
    return done.stdout
