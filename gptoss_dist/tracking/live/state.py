"""In which state a run is, by what its folder says: nobody has to be asked, and nothing is written.

    waits in the queue    a job was submitted after everything else in the folder
    starting, running     its process lives; between steps it may validate, save or write samples
    stalled               its process lives, and no step was done for long; or its watchdog has written why
    finished, stopped     it says so itself (DONE, STOPPED), or its journal does
    failed                the journal says so; the reason is in log.txt
    died                  its process is gone, and nobody said anything

A process of this machine lives or does not. One of another machine gives signs of life: it touches its record, and
rank 0 writes tracking/ranks.json. They are judged by their age, so that clocks of machines may differ by seconds.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.foreign import read_json
from data_pipeline.ownership import STALE_AFTER_S, sighting
from gptoss_dist.tracking.about.formats import clock, duration
from gptoss_dist.tracking.live.follow import JournalFollower, MetricsFollower, last_lines
from gptoss_dist.tracking.live.ranks import STALE_S, RanksReport
from gptoss_dist.tracking.records import JOURNAL_FILE, METRICS_FILE

Kind = Literal["waiting", "starting", "running", "stalled", "finished", "stopped", "failed", "died"]

QUIET_S = 60.0
"""A step is never called stalled before it has taken this long,"""
QUIET_FACTOR = 10.0
"""nor before so many times what steps took lately."""
_BETWEEN_STEPS = ("validation", "checkpoint", "samples", "evaluation")


@dataclass(frozen=True)
class State:
    """What a run does, in a word and in words."""

    kind: Kind
    text: str

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes unless somebody starts the run again."""
        return self.kind in ("finished", "stopped", "failed", "died")


def judge(
    run_dir: Path,
    metrics: MetricsFollower,
    journal: JournalFollower,
    ranks: RanksReport | None,
    now: float | None = None,
) -> State:
    """Return the state of a run.

    Args:
        run_dir: Its folder.
        metrics: What its metrics say so far.
        journal: What its journal says so far.
        ranks: What its ranks last did, if that is known.
        now: Seconds since 1970; by default the time.

    Raises:
        OSError: The folder cannot be read.
    """
    now = time.time() if now is None else now
    owner = sighting(run_dir)
    age = max(0.0, now - max(owner.touched if owner else 0.0, ranks.time if ranks else 0.0))
    is_alive = owner.is_alive if owner and owner.is_alive is not None else owner is not None and age < STALE_AFTER_S
    if is_alive:
        return _of_a_process(metrics, journal, ranks, now)
    if job := _waiting_job(run_dir):
        return State("waiting", f"{job} was submitted and has not started yet")
    if said := _said(run_dir, "DONE"):
        return State("finished", f"finished at step {said.get('step', '?')}")
    if said := _said(run_dir, "STOPPED"):
        return State("stopped", f"stopped at step {said.get('step', '?')}: {said.get('reason', 'as asked')}")
    if stall := _newest_stall(run_dir, journal.start.time if journal.start else 0.0):
        return State("failed", f"stalled and ended; the stacks of its ranks are in {stall}")
    return _ended(run_dir, metrics, journal, owner.name if owner else None, now)


def _of_a_process(metrics: MetricsFollower, journal: JournalFollower, ranks: RanksReport | None, now: float) -> State:
    """Return the state of a run whose process lives."""
    began = journal.start.time if journal.start else metrics.last_time
    last = max(began, metrics.last_time)
    doing = _phase(ranks, now)
    if not metrics.times.steps or metrics.times.values[-1] < began:
        return State("starting", f"starting since {clock(began)}" + (f" ({doing})" if doing else ""))
    if doing in _BETWEEN_STEPS:
        return State("running", f"running: {doing}")
    usual = metrics.seconds_per_step() or 0.0
    if now - last > max(QUIET_S, QUIET_FACTOR * usual):
        silent = [str(state.rank) for state in ranks.ranks if state.is_silent] if ranks and doing else []
        where = f", in {doing}" if doing else ""
        if silent:
            where += f"; rank {', '.join(silent[:8])}{', ...' * (len(silent) > 8)} does not answer"
        return State(
            "stalled", f"no step since {clock(last)} ({duration(now - last)}{where}); a step takes {usual:.3g} s"
        )
    return State("running", "running")


def _phase(ranks: RanksReport | None, now: float) -> str:
    """Return what rank 0 does now, or a rank that is behind, for which it waits; empty if that is not known."""
    if ranks is None or not ranks.ranks or now - ranks.time > STALE_S:
        return ""
    return next((state for state in ranks.ranks if state.is_behind), ranks.ranks[0]).phase


def _ended(run_dir: Path, metrics: MetricsFollower, journal: JournalFollower, owner: str | None, now: float) -> State:
    """Return the state of a run that no process seems to work at and that left no marker."""
    if journal.end is not None:
        match journal.end.status:
            case "FINISHED":
                return State("finished", f"finished at step {metrics.step}")
            case "KILLED":
                return State("stopped", f"stopped at step {metrics.step}")
        return State("failed", f"failed at step {metrics.step}{_reason(run_dir)}")
    last = max(metrics.last_time, journal.start.time if journal.start else 0.0)
    if not last:
        return State("waiting", "nothing is recorded yet")
    if owner is None and now - last < STALE_AFTER_S:  # of a version that left no records of owners
        return State("running", "running")
    who = f" ({owner})" if owner else ""
    return State("died", f"its process{who} has ended without a word at step {metrics.step}, {clock(last)}")


def _reason(run_dir: Path) -> str:
    """Return the last error of log.txt."""
    errors = [line for line in last_lines(run_dir / "log.txt", 200) if " ERROR " in line]
    return f": {errors[-1].partition(': ')[2]}" if errors else ""


def _said(run_dir: Path, name: str) -> dict[str, Any]:
    """Return what a marker says, {} if it is not there."""
    if not (run_dir / name).exists():
        return {}
    with contextlib.suppress(ValueError):
        if values := read_json(run_dir / name, dict[str, Any]):
            return values
    return {"step": "?"}


def _waiting_job(run_dir: Path) -> str | None:
    """Return the newest submission, if it is newer than all that a run wrote."""
    scripts = [path for path in (run_dir / "job").glob("*/job.sbatch") if path.parent.name.isdecimal()]
    if not scripts:
        return None
    newest = max(scripts, key=lambda path: int(path.parent.name))
    written = max((_changed(run_dir / name) for name in (METRICS_FILE, JOURNAL_FILE, "log.txt")), default=0.0)
    logs = any(re.fullmatch(r".*\.log", path.name) for path in newest.parent.iterdir())
    is_waiting = _changed(newest) > written and not logs
    return f"job {newest.parent.relative_to(run_dir)}" if is_waiting else None


def _newest_stall(run_dir: Path, began: float) -> Path | None:
    """Return the folder of stacks that the last start of the run left, if there is one."""
    # The clock of a file system may be behind that of a process, and be it by a tick.
    earliest = began - 1.0
    stalls = [path for path in (run_dir / "stalls").glob("step_*") if path.is_dir() and _changed(path) >= earliest]
    return max(stalls, key=_changed, default=None)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
