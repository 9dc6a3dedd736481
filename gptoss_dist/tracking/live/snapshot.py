"""What is known of a run at a moment, for a screen or a few plain lines."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.foreign import parse_yaml, read_text
from gptoss_dist.tracking.live.follow import Curve, JournalFollower, MetricsFollower, last_lines, last_sample
from gptoss_dist.tracking.live.ranks import STALE_S, RanksReport, read_ranks
from gptoss_dist.tracking.live.state import State, judge
from gptoss_dist.tracking.records import JOURNAL_FILE, METRICS_FILE

_EXPECTED = ("config.yaml", METRICS_FILE, JOURNAL_FILE, "job")
"""A folder that holds none of these is not a run's."""


@dataclass(frozen=True)
class Snapshot:
    """A run as its folder shows it."""

    name: str
    folder: Path
    state: State
    step: int
    last_step: int | None
    """The step that it is to end with; None if its settings cannot be read."""
    seconds_per_step: float | None
    loss: Curve
    validation: Curve
    newest: dict[str, float]
    """The last value of each metric."""
    tags: dict[str, str]
    resumes: list[int]
    """The steps after which it was resumed,"""
    rewinds: list[int]
    """and those that it went back to by itself, as the loss had risen."""
    ranks: RanksReport | None
    """None if they are not known, or no longer true."""
    sample: tuple[int, str] | None
    """Step and text."""
    messages: list[str]
    taken: float
    """Seconds since 1970."""

    @property
    def remaining_s(self) -> float | None:
        """Seconds to the last step at the pace of the last steps; None if the run does not train or cannot tell."""
        if self.last_step is None or self.seconds_per_step is None or self.state.kind != "running":
            return None
        return max(0, self.last_step - self.step) * self.seconds_per_step


class RunWatch:
    """A look at a run, again and again; it reads what is new, and writes nothing.

    Args:
        run_dir: Folder of the run.
        messages: Lines of its log that are kept.

    Raises:
        ValueError: There is no such folder, or it is not a run's.
    """

    def __init__(self, run_dir: str | Path, messages: int = 8) -> None:
        self._run_dir, self._messages = Path(run_dir), messages
        check_run(self._run_dir)
        self._metrics, self._journal = MetricsFollower(self._run_dir), JournalFollower(self._run_dir)
        self._settings: dict[str, Any] = {}
        self._settings_changed = 0.0

    def look(self) -> Snapshot:
        """Return what the folder shows now.

        Raises:
            ValueError: The folder has been deleted or renamed.
            OSError: It cannot be read at the moment.
        """
        if not self._run_dir.is_dir():
            raise ValueError(f"{self._run_dir} has been deleted or renamed; give the folder that the run has now")
        self._metrics.read()
        self._journal.read()
        self._read_settings()
        now, ranks = time.time(), read_ranks(self._run_dir)
        state = judge(self._run_dir, self._metrics, self._journal, ranks, now)
        # A finished run that is started again returns to its last step and trains nothing.
        returns = [step for step in self._metrics.resumes if step < self._metrics.step or not state.is_over]
        return Snapshot(
            name=self._run_dir.resolve().name,
            folder=self._run_dir,
            state=state,
            step=self._metrics.step,
            last_step=self._last_step(),
            seconds_per_step=self._metrics.seconds_per_step(),
            loss=self._metrics.curves["loss/train"],
            validation=self._metrics.curves["loss/val"],
            newest={name: value for name, (_, value) in self._metrics.newest.items()},
            tags=self._journal.tags,
            resumes=[step for step in returns if step not in self._journal.rewinds],
            rewinds=[step for step in returns if step in self._journal.rewinds],
            ranks=ranks if ranks is not None and now - ranks.time <= STALE_S and not state.is_over else None,
            sample=last_sample(self._run_dir),
            messages=last_lines(self._run_dir / "log.txt", self._messages),
            taken=now,
        )

    def _read_settings(self) -> None:
        """Read config.yaml if it has changed; one that is half written is read the next time."""
        path = self._run_dir / "config.yaml"
        try:
            changed = path.stat().st_mtime
            if changed != self._settings_changed:
                found = parse_yaml(read_text(path), path)
                self._settings, self._settings_changed = found if isinstance(found, dict) else {}, changed
        except (OSError, ValueError):
            return

    def _last_step(self) -> int | None:
        train = self._settings.get("train")
        steps = train.get("steps") if isinstance(train, dict) else None
        return steps if isinstance(steps, int) else None


def check_run(run_dir: Path) -> None:
    """Refuse what is not the folder of a run.

    Raises:
        ValueError: There is no such folder, or nothing of a run in it.
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: there is no such folder; give that of a run, such as runs/quickstart")
    if not any((run_dir / name).exists() for name in _EXPECTED):
        raise ValueError(f"{run_dir} holds no run ({', '.join(_EXPECTED)}); give the folder of a run")
