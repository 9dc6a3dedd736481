"""The records of `metrics.jsonl` and `tracking/journal.jsonl`, checked as they are read.

A line may be valid JSON and damaged all the same: a key is missing, a text stands for a number, a number has 400
digits. Whoever reads a file gets a typed record or None for such a line, passes over it and counts it.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptoss_dist.tracking.jsonl import read_lines

METRICS_FILE = "metrics.jsonl"
JOURNAL_FILE = "tracking/journal.jsonl"
SYSTEM_FOLDER = "tracking/system"

_LAST_STEP = 2**53
_LAST_TIME = 1e11
"""Seconds since 1970: in the year 5138. MLflow takes milliseconds of 64 bits, and plots take hours."""
STATUSES = ("FINISHED", "FAILED", "KILLED")
EVENT_KINDS = ("start", "resume", "rewind", "skipped", "data", "checkpoint", "stop", "end", "error")


@dataclass(frozen=True)
class MetricsRow:
    """Values of one step."""

    step: int
    time: float
    """Seconds since 1970."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class Resumed:
    """Training went back to a step."""

    step: int


@dataclass(frozen=True)
class RunStart:
    """A process began to train the run, first or again."""

    time: float
    uid: str
    """What the run is looked up by, before MLflow has given it an id."""
    run_name: str
    experiment: str
    params: dict[str, str]
    tags: dict[str, str]
    dataset: dict[str, str] | None
    """Its `name`, `digest` and `source`."""
    resume: int
    """How often the run was resumed."""
    resumed_step: int | None
    experiment_id: str | None = None
    """In the place of `experiment`, if given."""


@dataclass(frozen=True)
class Tag:
    """A property was set."""

    key: str
    value: str


@dataclass(frozen=True)
class Artifact:
    """A file or folder is to be uploaded."""

    path: str
    """Relative to the run's folder if it lies there."""
    folder: str | None


@dataclass(frozen=True)
class Event:
    """Something happened to the run that a person who reads its curves wants to know."""

    time: float
    step: int
    """After which step."""
    kind: str
    """One of `EVENT_KINDS`."""
    text: str
    """It in words, one line."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint was begun to be written."""

    time: float
    """That of its metrics, in seconds since 1970."""
    step: int
    path: str
    """Relative to the run's folder if it lies there."""
    metrics: dict[str, float]
    """What is known of its weights; finite numbers only."""


@dataclass(frozen=True)
class End:
    """The run ended."""

    time: float
    status: str


Operation = RunStart | Tag | Artifact | Event | Checkpoint | End


class _Damaged(ValueError):
    """A field is missing or of another type."""


@dataclass
class Damage:
    """A count of the damaged lines of one file, to be told to the user."""

    path: Path
    lines: int = 0
    _told: int = field(default=0, repr=False)

    def report(self, message: Callable[[str], None]) -> None:
        """Report the count, if it has grown since the last call."""
        if self.lines > self._told:
            self._told = self.lines
            what = "1 damaged line was" if self.lines == 1 else f"{self.lines} damaged lines were"
            message(f"{self.path}: {what} passed over; the other lines count")


def metrics_records(path: Path, damage: Damage) -> Iterator[MetricsRow | Resumed]:
    """Yield the records of a `metrics.jsonl` that are whole, and count the others.

    Raises:
        OSError: The file cannot be read.
    """
    for line, _ in read_lines(path):
        record = metrics_record(line)
        if record is None:
            damage.lines += 1
        else:
            yield record


def metrics_record(line: dict) -> MetricsRow | Resumed | None:
    """Return what a line of `metrics.jsonl` says, None if it is damaged."""
    try:
        if line.get("event") == "resume":
            return Resumed(_step(line))
        metrics = {key: _value(value) for key, value in _object(line, "metrics").items()}
        if "infinite" in line:
            metrics |= {key: _value(value) for key, value in _object(line, "infinite").items()}
        return MetricsRow(_step(line), _time(line), metrics)
    except _Damaged:
        return None


def operation(line: dict) -> Operation | None:
    """Return what a line of the journal says, None if it is damaged."""
    try:
        match line.get("op"):
            case "run":
                return RunStart(
                    time=_time(line),
                    uid=_identifier(line, "uid"),
                    run_name=_text(line, "run_name"),
                    experiment=_text(line, "experiment"),
                    params=_texts(line, "params"),
                    tags=_texts(line, "tags"),
                    dataset=_texts(line, "dataset") if line.get("dataset") is not None else None,
                    resume=_whole(line, "resume"),
                    resumed_step=_whole(line, "resumed_step") if line.get("resumed_step") is not None else None,
                    experiment_id=_text(line, "experiment_id") if line.get("experiment_id") is not None else None,
                )
            case "tag":
                return Tag(_text(line, "key"), _text(line, "value"))
            case "artifact":
                return Artifact(_text(line, "path"), _text(line, "folder") if line.get("folder") is not None else None)
            case "event" if line.get("kind") in EVENT_KINDS:
                return Event(_time(line), _step(line), line["kind"], _text(line, "text"))
            case "checkpoint":
                metrics = {key: _number(value) for key, value in _object(line, "metrics").items()}
                known = {key: value for key, value in metrics.items() if math.isfinite(value)}
                return Checkpoint(_time(line), _step(line), _text(line, "path"), known)
            case "end" if line.get("status") in STATUSES:
                return End(_time(line), line["status"])
    except _Damaged:
        pass
    return None


def run_starts(run_dir: Path) -> list[RunStart]:
    """Return how each process began, as a run's journal says, in order.

    Raises:
        OSError: It cannot be read.
    """
    records = (operation(line) for line, _ in read_lines(run_dir / JOURNAL_FILE))
    return [record for record in records if isinstance(record, RunStart)]


def free_number(folder: Path, *names: str) -> int:
    """Return the lowest number from 1 on under which nothing is kept of an earlier run in the same folder.

    Args:
        folder: Folder of the run.
        names: Such as `metrics.{}.jsonl`; none of them may be there.
    """
    numbers = itertools.count(1)
    return next(n for n in numbers if not any(os.path.lexists(folder / name.format(n)) for name in names))


def metrics_line(step: int, time: float, metrics: dict[str, float]) -> dict:
    """Return the line of `metrics.jsonl` for values of one step.

    JSON has no NaN and no infinity: both are null, so that pandas and every other reader takes a column of values for
    numbers. Which ones are infinite stands beside.
    """
    infinite = {key: "Infinity" if value > 0 else "-Infinity" for key, value in metrics.items() if math.isinf(value)}
    values = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    line = {"step": step, "time": time, "metrics": values}
    return line | {"infinite": infinite} if infinite else line


def _value(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity"):  # earlier versions wrote all three
        return float(value)
    return _number(value)


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _Damaged
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        raise _Damaged from None


def _time(line: dict) -> float:
    time = _number(line.get("time"))
    if not 0 <= time <= _LAST_TIME:
        raise _Damaged
    return time


def _step(line: dict) -> int:
    return _whole(line, "step")


def _whole(line: dict, key: str) -> int:
    value = line.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LAST_STEP:
        raise _Damaged
    return value


def _text(line: dict, key: str) -> str:
    value = line.get(key)
    if not isinstance(value, str):
        raise _Damaged
    return value


def _identifier(line: dict, key: str) -> str:
    value = _text(line, key)
    if not re.fullmatch("[0-9a-z]{1,64}", value):  # it becomes part of a query
        raise _Damaged
    return value


def _object(line: dict, key: str) -> dict:
    value = line.get(key)
    if not isinstance(value, dict):
        raise _Damaged
    return value


def _texts(line: dict, key: str) -> dict[str, str]:
    values = _object(line, key)
    if not all(isinstance(value, str) for value in values.values()):
        raise _Damaged
    return values
