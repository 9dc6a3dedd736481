"""The metrics of a run as arrays, read from `metrics.jsonl` once.

    metrics.jsonl    line 1 ... 4096 | 4097 ... 8192 | 8193 ... 9000
    columns/         0.columns       | 1.columns     | rest.columns, until there is more

A run of 100,000 steps is 100 MB of JSON, which takes seconds to parse; whoever plots or compares runs needs a few
columns of it. So every 4,096 lines, once they are complete, are kept as a *segment*: a file of binary columns below
`tracking/columns/`. Segments are never changed; one that does not fit its lines is ignored and written anew, and all of
them may be deleted at any time. The rest is kept too, in a file that counts as long as no line was added. A folder that
cannot be written, of another user's run, is read all the same.

Layout of a segment: a line of JSON (`_Header`), then for each of its names one little-endian float64 per line.

Shapes: N steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.disk import replacing
from data_pipeline.foreign import Count, convert, parse_json
from gptoss_dist.tracking.jsonl import read_lines
from gptoss_dist.tracking.records import METRICS_FILE, Damage, MetricsRow, Resumed, metrics_record

logger = logging.getLogger(__name__)

COLUMNS_FOLDER = "tracking/columns"
LINES = 4096
"""Of a segment."""

_REST_FILE, _LEAST_REST = "rest.columns", 512
"""What is behind the last whole segment, and how many lines are worth keeping."""
_FORMAT = 1
_STEP, _TIME = "step", "time"
_LONGEST_HEADER = 2**20
_NO_SOURCES = ("loss/val_ppl", "loss/val_best")
"""Metrics that are named like the validation loss of a source, and tell of all of them."""
_CHECKED = 1024
"""Bytes at the end of a segment's lines that must be as they were."""


class Columns(Mapping[str, np.ndarray]):
    """Metrics of a run by name, each float64 [N]: a row for each step of the branch that training finally took.

    Where a step did not log a metric, or logged one that is no number, its row is NaN. A column is read from disk when
    it is first asked for.
    """

    def __init__(self, segments: Sequence[_Segment]) -> None:
        self._segments = segments
        self._kept: dict[str, np.ndarray] = {}
        self._names = sorted({name for segment in segments for name in segment.header.names} - {_STEP, _TIME})
        step, first = self._lines(_STEP), np.cumsum([0, *(segment.header.lines for segment in segments)])
        resumes = [
            (int(begin) + line, step_of)
            for begin, segment in zip(first, segments)
            for line, step_of in segment.header.resumes
        ]
        alive, self.resumes = _final_branch(step, resumes)
        lines = np.flatnonzero(alive)
        self.steps, at, row_of = np.unique(step[lines].astype(np.int64), return_index=True, return_inverse=True)
        """Steps in order, int64 [N]."""
        # A step may have several lines, which are one row: its first one is in `_first`, those behind it in `_later`.
        self._first = lines[at]
        is_later = np.ones(len(lines), bool)
        is_later[at] = False
        self._later, self._row_of_later = lines[is_later], row_of[is_later]
        self.line_times = self._lines(_TIME)
        """Seconds since 1970 of all lines in the order of the file, those of abandoned branches too; NaN where a line
        has none."""
        # What is written later at a step, by its validation, a sample, the end or a resume, is not when it was done.
        self.times = self.line_times[self._first]
        """Seconds since 1970 at which each step was first written, float64 [N]."""
        self.damaged = sum(segment.header.damaged for segment in segments)
        """Lines that could not be read."""
        self.end = segments[-1].header.end if segments else 0
        """How much of the file was read, in bytes: what it gained since begins there."""

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._kept:
            if name not in self._names:
                raise KeyError(name)
            self._kept[name] = self._rows(self._lines(name))
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows in which a metric is a number, and its values there; both empty if it was never logged."""
        values = self.get(name)
        if values is None:
            return np.empty(0, np.int64), np.empty(0)
        rows = np.flatnonzero(~np.isnan(values))
        return rows, values[rows]

    def filled(self, name: str) -> np.ndarray:
        """Return a metric with its last number wherever a step has none, [N]; NaN before the first."""
        return filled(self.get(name, np.full(len(self.steps), np.nan)))

    def _lines(self, name: str) -> np.ndarray:
        """Return one value per line of the file."""
        lines = np.full(sum(segment.header.lines for segment in self._segments), np.nan)
        begin = 0
        for segment in self._segments:
            end = begin + segment.header.lines
            segment.read(name, lines[begin:end])
            begin = end
        return lines

    def _rows(self, lines: np.ndarray) -> np.ndarray:
        """Return one value per step: the last number among those of its lines."""
        result, later = lines[self._first], lines[self._later]
        known = ~np.isnan(later)
        result[self._row_of_later[known]] = later[known]  # of equal indices numpy takes the last
        return result


def filled(column: np.ndarray) -> np.ndarray:
    """Return a column [N] with its last number wherever it has none; NaN before the first."""
    last = np.maximum.accumulate(np.where(np.isnan(column), -1, np.arange(len(column))))
    return np.where(last >= 0, column[last], np.nan)


def is_validation(metric: str) -> bool:
    """Return whether a metric is a validation loss: `loss/val`, or `loss/val_NAME` of a source."""
    return metric == "loss/val" or (metric.startswith("loss/val_") and metric not in _NO_SOURCES)


def read_columns(run_dir: str | Path, message: Callable[[str], None] = logger.warning, *, keep: bool = True) -> Columns:
    """Read the metrics of a run; a later call reads only what was not kept before.

    Args:
        run_dir: Folder of the run.
        message: What is told how many lines are damaged, if any is.
        keep: Keep complete segments in the run's folder, where it can be written.

    Raises:
        ValueError: The folder has no metrics.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run")
    folder = Path(run_dir) / COLUMNS_FOLDER
    segments: list[_Segment] = []
    end = 0
    while (segment := _kept_segment(folder / f"{len(segments)}.columns", path, end)) is not None:
        segments.append(segment)
        end = segment.header.end
    rest = _kept_segment(folder / _REST_FILE, path, end, in_memory=True)  # others replace this file
    if rest is not None and rest.header.end == path.stat().st_size:
        segments.append(rest)
        return _told(Columns(segments), path, message)
    for segment in _parse(path, end):
        is_whole = segment.header.lines == LINES
        if keep and (is_whole or segment.header.lines >= _LEAST_REST):
            with contextlib.suppress(OSError):  # it is parsed again next time
                segment.write(folder / (f"{len(segments)}.columns" if is_whole else _REST_FILE))
        segments.append(segment)
    return _told(Columns(segments), path, message)


def _told(columns: Columns, path: Path, message: Callable[[str], None]) -> Columns:
    Damage(path, columns.damaged).report(message)
    return columns


@dataclass(frozen=True)
class _Header:
    format: int
    begin: Count
    """Offset of the first line in `metrics.jsonl`."""
    end: Count
    """Offset behind the last line."""
    check: Count
    """CRC-32 of the last bytes of these lines, by which a file that was replaced is recognised."""
    lines: Count
    damaged: Count
    resumes: list[tuple[Count, Count]]
    """At which of these lines training went back, and to which step."""
    names: list[str]


@dataclass(frozen=True)
class _Segment:
    """Some lines of the file, as columns in memory or in a file."""

    header: _Header
    values: np.ndarray | None = None
    """[names, lines]"""
    path: Path | None = None
    offset: int = 0
    """Where the first column begins in `path`."""

    def read(self, name: str, into: np.ndarray) -> None:
        """Write the values of a metric into float64 [lines], which stays as it is if no line has one.

        Raises:
            OSError: The file cannot be read.
        """
        if name not in self.header.names:
            return
        row = self.header.names.index(name)
        if self.path is None:
            assert self.values is not None, "a segment is in memory or in a file"
            into[:] = self.values[row]
            return
        values = np.empty(len(into), "<f8")
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + values.nbytes * row)
            if file.readinto(values.data) == values.nbytes:  # else it was cut in this moment
                into[:] = values

    def write(self, path: Path) -> None:
        """Keep it in a file, whole or not at all."""
        assert self.values is not None, "it is in a file already"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.write(json.dumps(dataclasses.asdict(self.header)).encode() + b"\n")
            file.write(self.values.astype("<f8", copy=False).tobytes())


def _kept_segment(path: Path, metrics: Path, begin: int, *, in_memory: bool = False) -> _Segment | None:
    """Return the segment in a file, None if there is none that fits the lines behind `begin`."""
    try:
        with open(path, "rb") as file:
            line = file.readline(_LONGEST_HEADER)
            size = os.fstat(file.fileno()).st_size - len(line)
            data = file.read() if in_memory else b""
        header = convert(parse_json(line.decode(), path), _Header, path)
        fits = header.format == _FORMAT and header.begin == begin and size == 8 * header.lines * len(header.names)
        fits = fits and {_STEP, _TIME} <= set(header.names) and header.check == _check(metrics, header.end)
    except (OSError, ValueError):
        return None
    if not fits:
        return None
    if in_memory:
        return _Segment(header, np.frombuffer(data, "<f8").reshape(len(header.names), header.lines))
    return _Segment(header, path=path, offset=len(line))


def _check(metrics: Path, end: int) -> int:
    with open(metrics, "rb") as file:
        file.seek(max(0, end - _CHECKED))
        return zlib.crc32(file.read(min(end, _CHECKED)))


def _parse(path: Path, begin: int) -> Iterator[_Segment]:
    """Yield the lines behind `begin` as segments of `LINES` lines, and what is left as one that is shorter."""
    records: list[MetricsRow | Resumed | None] = []
    end = begin
    for line, end in read_lines(path, begin):
        records.append(metrics_record(line))
        if len(records) == LINES:
            yield _segment(records, path, begin, end)
            records, begin = [], end
    if records:
        yield _segment(records, path, begin, end)


def _segment(records: list[MetricsRow | Resumed | None], path: Path, begin: int, end: int) -> _Segment:
    names = sorted({name for record in records if isinstance(record, MetricsRow) for name in record.metrics})
    names = [_STEP, _TIME, *(name for name in names if name not in (_STEP, _TIME))]
    row = {name: number for number, name in enumerate(names)}
    values = np.full((len(names), len(records)), np.nan)
    resumes = []
    for i, record in enumerate(records):
        if isinstance(record, Resumed):
            resumes.append((i, record.step))
        elif record is not None:
            for name, value in record.metrics.items():
                values[row[name], i] = value
            values[0, i], values[1, i] = record.step, record.time
    header = _Header(
        _FORMAT, begin, end, _check(path, end), len(records), sum(r is None for r in records), resumes, names
    )
    return _Segment(header, values)


def _final_branch(step: np.ndarray, resumes: Sequence[tuple[int, int]]) -> tuple[np.ndarray, list[int]]:
    """Return which lines belong to the branch that training finally took, and the steps where it went on by a resume.

    Args:
        step: Of each line; NaN where it has none.
        resumes: The line of each resume, and the step that training went back to.
    """
    alive = ~np.isnan(step)
    steps: list[int] = []
    for line, to in resumes:
        alive[:line] &= step[:line] <= to
        steps = [one for one in steps if one < to] + [to]
    return alive, steps
