"""Reading what the files of a run gain, while somebody else writes them.

`metrics.jsonl` grows by whole lines. Where training goes back it says so in a line, and a fresh start renames the file
and begins another one, which is seen by its number on the disk: then everything is read anew.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gptoss_dist.tracking.jsonl import read_lines
from gptoss_dist.tracking.recorded.columns import read_columns
from gptoss_dist.tracking.records import (
    JOURNAL_FILE,
    METRICS_FILE,
    End,
    Event,
    MetricsRow,
    Resumed,
    RunStart,
    Tag,
    metrics_record,
    operation,
)

_TRIED = 3
"""Newest files of samples that are tried: one may be no file, or be deleted in this moment."""

logger = logging.getLogger(__name__)

CURVES = ("loss/train", "loss/val", "perf/tokens_per_s", "perf/mfu", "optim/grad_norm")
"""Metrics of which all values are kept; of the others the last one."""
_OF_STEPS = ("loss/train", "optim/lr", "progress/tokens")
"""Metrics that optimizer steps log, and nothing else does; the loss of a step may be no number."""


class Tail:
    """The lines that a file gains, and whether it is still the same file."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        """How far it was read, in bytes."""
        self._identity: tuple[int, int] | None = None

    def is_another(self) -> bool:
        """Return whether there is another file than at the last call; it is read from its beginning then.

        Raises:
            OSError: That cannot be told.
        """
        try:
            status = os.stat(self.path)
        except FileNotFoundError:  # not yet, or between two runs
            return False
        identity = status.st_dev, status.st_ino
        if identity == self._identity and status.st_size >= self.offset:
            return False
        self._identity, self.offset = identity, 0
        return True

    def new_lines(self) -> Iterator[dict]:
        """Yield the lines since the last call.

        Raises:
            OSError: The file cannot be read.
        """
        for line, end in read_lines(self.path, self.offset):
            self.offset = end
            yield line


@dataclass
class Curve:
    """Values of one metric by step, of the branch that training took so far."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Take the value of a step; of one that is there already, it is the newer one."""
        at = bisect.bisect_left(self.steps, step)
        if at < len(self.steps) and self.steps[at] == step:
            self.values[at] = value
        else:
            self.steps.insert(at, step)
            self.values.insert(at, value)

    def has(self, step: int) -> bool:
        """Return whether there is a value of a step."""
        at = bisect.bisect_left(self.steps, step)
        return at < len(self.steps) and self.steps[at] == step


class MetricsFollower:
    """What `metrics.jsonl` says so far; `read` takes in what is new.

    Args:
        run_dir: Folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._tail = Tail(run_dir / METRICS_FILE)
        self._forget()

    def _forget(self) -> None:
        self._is_stale = True
        self.curves: dict[str, Curve] = {name: Curve() for name in CURVES}
        self.newest: dict[str, tuple[int, float]] = {}
        """Step and value of each metric when it was last a number."""
        self.times = Curve()
        """Seconds since 1970 when each optimizer step of the process that trains now, or trained last, was last written
        of."""
        self.last_time = 0.0
        """When anything was logged last."""
        self.resumes: list[int] = []
        """The steps that training went on from, by a resume or by itself."""

    def read(self) -> None:
        """Take in what is new.

        Raises:
            OSError: The file cannot be read.
        """
        if self._tail.is_another():
            self._forget()
        if self._is_stale:
            self._load()
        for line in self._tail.new_lines():
            record = metrics_record(line)
            if isinstance(record, Resumed):
                self._is_stale = True  # also if reading fails at the moment
                self._load()
                return
            if isinstance(record, MetricsRow):
                self._add(record)

    def _load(self) -> None:
        """Take in all that is there, by the columns that the run has kept."""
        try:
            columns = read_columns(self._tail.path.parent, logger.debug, keep=False)
        except ValueError:  # not there yet, or renamed in this moment
            return
        self._forget()
        self._tail.offset = columns.end
        for name in columns:
            rows, values = columns.points(name)
            if not len(rows):
                continue
            if name in self.curves:
                self.curves[name] = Curve(columns.steps[rows].tolist(), values.tolist())
            self.newest[name] = int(columns.steps[rows[-1]]), float(values[-1])
        trained = np.unique(np.concatenate([columns.points(name)[0] for name in _OF_STEPS]))
        rows = trained[columns.steps[trained] > max(columns.resumes, default=-1)]
        self.times = Curve(columns.steps[rows].tolist(), columns.times[rows].tolist())
        self.last_time = float(np.nanmax(columns.line_times, initial=0.0))
        self.resumes = list(columns.resumes)
        self._is_stale = False

    def _add(self, row: MetricsRow) -> None:
        """Take in a line; what is no number is left out, as columns do."""
        self.last_time = max(self.last_time, row.time)
        numbers = {name: value for name, value in row.metrics.items() if not math.isnan(value)}
        for name, value in numbers.items():
            if row.step >= self.newest.get(name, (row.step, 0.0))[0]:
                self.newest[name] = row.step, value
        for name in CURVES:
            if name in numbers:
                self.curves[name].add(row.step, numbers[name])
        is_trained = row.step > max(self.resumes, default=-1) and any(name in numbers for name in _OF_STEPS)
        if is_trained or self.times.has(row.step):
            self.times.add(row.step, row.time)

    @property
    def step(self) -> int:
        """The last optimizer step that was reported."""
        return self.times.steps[-1] if self.times.steps else max(self.resumes, default=0)

    def seconds_per_step(self, window: int = 100) -> float | None:
        """Return the time of a step lately, validations and checkpoints included; None before there are two."""
        steps, times = self.times.steps[-window:], self.times.values[-window:]
        return (times[-1] - times[0]) / (steps[-1] - steps[0]) if len(steps) > 1 else None


class JournalFollower:
    """How the run began last, and whether it has ended since, by `tracking/journal.jsonl`."""

    def __init__(self, run_dir: Path) -> None:
        self._tail = Tail(run_dir / JOURNAL_FILE)
        self._forget()

    def _forget(self) -> None:
        self.start: RunStart | None = None
        self.end: End | None = None
        self.tags: dict[str, str] = {}
        self.rewinds: set[int] = set()
        """The steps that training went back to by itself, as the loss had risen."""
        self._goes_back = False

    def read(self) -> None:
        """Take in what is new.

        Raises:
            OSError: The file cannot be read.
        """
        if self._tail.is_another():
            self._forget()
        for line in self._tail.new_lines():
            match operation(line):
                case RunStart() as start:
                    self.start, self.end = start, None
                    self.tags |= start.tags
                    if self._goes_back and start.resumed_step is not None:
                        self.rewinds.add(start.resumed_step)
                    self._goes_back = False
                case Event(kind="rewind"):
                    self._goes_back = True
                case Event(kind="resume", step=step):
                    self.rewinds.discard(step)
                case Tag(key=key, value=value):
                    self.tags[key] = value
                case End() as end:
                    self.end = end


def last_lines(path: Path, most: int, most_bytes: int = 2**16) -> list[str]:
    """Return the last complete lines of a text file, as far as its last `most_bytes` hold them; [] if it is not there.

    Raises:
        OSError: It cannot be read.
    """
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - most_bytes))
        lines = file.read(most_bytes).decode("utf-8", "replace").split("\n")
    return lines[1 if size > most_bytes else 0 : -1][-most:]


def sample_files(run_dir: Path) -> dict[int, Path]:
    """Return the files of texts that the model wrote, by the step after which it did.

    Raises:
        OSError: The folder cannot be read.
    """
    folder = run_dir / "samples"
    if not folder.is_dir():
        return {}
    found = [path for path in folder.iterdir() if path.name.startswith("step_") and path.suffix == ".txt"]
    names = {path.stem.removeprefix("step_"): path for path in found}
    return {int(number): path for number, path in names.items() if number.isdecimal()}


def texts_of(sample: str) -> list[str]:
    """Return the texts of one file, one for each prompt."""
    return sample.rstrip("\n").split("\n\n----\n\n")


def last_sample(run_dir: Path, most_bytes: int = 2**14) -> tuple[int, str] | None:
    """Return the newest text that the model wrote, and the step after which it did; None if there is none.

    Raises:
        OSError: The folder cannot be read.
    """
    files = sample_files(run_dir)
    for step in sorted(files, reverse=True)[:_TRIED]:
        with contextlib.suppress(OSError), open(files[step], "rb") as file:
            return step, texts_of(file.read(most_bytes).decode("utf-8", "replace"))[0]
    return None
