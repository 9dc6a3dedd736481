"""Reading what the files of a run gain, while somebody else writes them.

`metrics.jsonl` grows by whole lines. Where training goes back it says so in a line, and a fresh start renames the file
and begins another one: that is seen by its number on the disk, and everything is read anew.
"""

from __future__ import annotations

import bisect
import contextlib
import logging
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

    def cut(self, step: int) -> None:
        """Forget what was after a step."""
        at = bisect.bisect_right(self.steps, step)
        del self.steps[at:], self.values[at:]


class MetricsFollower:
    """What `metrics.jsonl` says so far; `read` takes in what is new.

    Args:
        run_dir: Folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._tail = Tail(run_dir / METRICS_FILE)
        self._forget()

    def _forget(self) -> None:
        self.curves: dict[str, Curve] = {name: Curve() for name in CURVES}
        self.newest: dict[str, tuple[int, float]] = {}
        """Step and value of each metric when it was last logged."""
        self.times = Curve()
        """Seconds since 1970 of each optimizer step of the process that trains now, or trained last."""
        self.last_time = 0.0
        """When anything was logged last."""
        self.resumes: list[int] = []
        """The steps that training went on from."""

    def read(self) -> None:
        """Take in what is new.

        Raises:
            OSError: The file cannot be read.
        """
        if self._tail.is_another():
            self._forget()
            self._load()
        for line in self._tail.new_lines():
            record = metrics_record(line)
            if isinstance(record, Resumed):
                self._go_back(record.step)
            elif isinstance(record, MetricsRow):
                self._add(record)

    def _load(self) -> None:
        """Take in what is there already, by the columns that the run has kept."""
        try:
            columns = read_columns(self._tail.path.parent, logger.debug, keep=False)
        except ValueError:  # renamed in this moment
            return
        self._tail.offset = columns.end
        for name in columns:
            rows, values = columns.points(name)
            if not len(rows):
                continue
            if name in self.curves:
                self.curves[name] = Curve(columns.steps[rows].tolist(), values.tolist())
            self.newest[name] = int(columns.steps[rows[-1]]), float(values[-1])
        rows, _ = columns.points("loss/train")
        rows = rows[columns.steps[rows] > max(columns.resumes, default=-1)]
        self.times = Curve(columns.steps[rows].tolist(), columns.times[rows].tolist())
        self.last_time = float(np.nanmax(columns.line_times, initial=0.0))
        self.resumes = list(columns.resumes)

    def _add(self, row: MetricsRow) -> None:
        self.last_time = max(self.last_time, row.time)
        for name, value in row.metrics.items():
            self.newest[name] = row.step, value
        for name in CURVES:
            if name in row.metrics:
                self.curves[name].add(row.step, row.metrics[name])
        if "loss/train" in row.metrics:
            self.times.add(row.step, row.time)

    def _go_back(self, step: int) -> None:
        for curve in self.curves.values():
            curve.cut(step)
        self.newest = {name: found for name, found in self.newest.items() if found[0] <= step}
        self.times = Curve()  # the time between two processes says nothing of how fast either is
        self.resumes = [*(earlier for earlier in self.resumes if earlier < step), step]

    @property
    def step(self) -> int:
        """The last optimizer step that was reported."""
        steps = self.curves["loss/train"].steps
        return steps[-1] if steps else max(self.resumes, default=0)

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
