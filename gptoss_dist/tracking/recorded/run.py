"""A run as its folder tells of it: settings, properties, what happened, and its metrics on four axes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.foreign import parse_yaml, read_text
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.planner.flops import flops_per_token
from gptoss_dist.tracking.delivery.cursor import Cursor
from gptoss_dist.tracking.jsonl import read_lines
from gptoss_dist.tracking.recorded.columns import Columns, read_columns
from gptoss_dist.tracking.records import JOURNAL_FILE, End, Event, Operation, RunStart, Tag, operation

logger = logging.getLogger(__name__)

RUNNING = "RUNNING"
"""The status of a run that has not ended, or whose process was killed."""


@dataclass(frozen=True)
class RecordedRun:
    """What is known of a run. N is the number of its steps."""

    name: str
    folder: Path | None
    """None if it is known from a server only."""
    run_id: str | None
    """MLflow's."""
    config: dict[str, Any]
    """Settings, flat: `optim.lr` and its value."""
    tags: dict[str, str]
    dataset: dict[str, str]
    """`name`, `digest` and `source` of the training data."""
    status: str
    """FINISHED, FAILED, KILLED or RUNNING."""
    starts: list[RunStart]
    """Of each process, or each return to an earlier checkpoint, in order."""
    events: list[Event]
    """What happened, in order."""
    columns: Columns
    tokens: np.ndarray
    """Seen after each step, float64 [N]."""
    exaflops: np.ndarray
    """Model FLOPs of the run after each step in units of 1e18, float64 [N]; NaN where they are unknown."""
    hours: np.ndarray
    """Time of its processes until each step was recorded, lost steps included and pauses left out, float64 [N]."""


def read_run(folder: str | Path, message: Callable[[str], None] = logger.warning, *, keep: bool = True) -> RecordedRun:
    """Read what a run's folder says; of a run that is under way, what it says so far.

    Args:
        folder: Folder of the run.
        message: What is told what cannot be read.
        keep: Keep its metrics in a form that is read faster next time, if the folder can be written.

    Raises:
        ValueError: The folder has no metrics.
    """
    folder = Path(folder)
    columns = read_columns(folder, message, keep=keep)
    operations = list(_operations(folder, message))
    starts = [one for one in operations if isinstance(one, RunStart)]
    tags: dict[str, str] = {}
    for one in operations:
        if isinstance(one, RunStart):
            tags |= one.tags
        elif isinstance(one, Tag):
            tags[one.key] = one.value
    config = _config(folder, message) or (dict(starts[-1].params) if starts else {})
    tokens = columns.filled("progress/tokens")
    tokens[columns.steps == 0] = 0.0  # of a validation before the first step
    return RecordedRun(
        name=folder.resolve().name,
        folder=folder,
        run_id=Cursor.load(folder, logger.debug).run_id,
        config=config,
        tags=tags,
        dataset=next((one.dataset for one in reversed(starts) if one.dataset), {}),
        status=_status(operations),
        starts=starts,
        events=_events(operations, starts, columns),
        columns=columns,
        tokens=tokens,
        exaflops=_exaflops(columns, tokens, config, tags),
        hours=active_hours([start.time for start in starts], columns),
    )


def active_hours(starts: list[float], columns: Columns) -> np.ndarray:
    """Return for how long processes had worked when each step was recorded, in hours [N].

    Args:
        starts: When each process began, in seconds since 1970; none counts from the first line.
        columns: Their metrics. What a process did after its last line is not known, and counts nothing.
    """
    lines = columns.line_times[~np.isnan(columns.line_times)]
    if not len(lines):
        return np.full(len(columns.steps), np.nan)
    begins = sorted({start for start in starts if start <= lines[-1]}) or [lines[0]]
    begins[0] = min(begins[0], lines[0])
    hours = np.zeros(len(columns.steps))
    for begin, following in zip(begins, [*begins[1:], np.inf]):
        own = lines[(lines >= begin) & (lines < following)]
        end = own.max() if len(own) else begin
        hours += np.clip(columns.times, begin, end) - begin
    return hours / 3600


def training_flops(config: dict[str, Any]) -> float | None:
    """Return the model FLOPs of one token, forward and backward, by a run's flat settings; None if they do not say."""
    fields = {key.removeprefix("model."): value for key, value in config.items() if key.startswith("model.")}
    fields = {name: value for name, value in fields.items() if "." not in name}  # rope_scaling costs no matrix product
    try:
        return flops_per_token(ModelConfig(**fields), int(config["data.seq_len"])).training
    except (KeyError, TypeError, ValueError):
        return None


def flat(
    tree: Mapping[str, Any], prefix: str = "", is_section: Callable[[str], bool] = lambda key: True
) -> dict[str, Any]:
    """Return a tree of settings as one dictionary: `{"optim": {"lr": 1}}` is `{"optim.lr": 1}`.

    Args:
        tree: The settings.
        prefix: Of all keys.
        is_section: Whether a mapping is taken apart, by its key; others stay values.
    """
    result: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and is_section(key):
            result |= flat(value, f"{key}.", is_section)
        else:
            result[key] = value
    return result


def _operations(folder: Path, message: Callable[[str], None]) -> Iterator[Operation]:
    try:
        for line, _ in read_lines(folder / JOURNAL_FILE):
            if (one := operation(line)) is not None:
                yield one
    except OSError as error:
        message(f"{folder / JOURNAL_FILE} cannot be read: {error.strerror}")


def _config(folder: Path, message: Callable[[str], None]) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    try:
        tree = parse_yaml(read_text(path), path)
    except ValueError as error:
        message(str(error))
        return {}
    return flat(tree) if isinstance(tree, dict) else {}


def _status(operations: list[Operation]) -> str:
    last = next((one for one in reversed(operations) if isinstance(one, (RunStart, End))), None)
    return last.status if isinstance(last, End) else RUNNING


def _exaflops(columns: Columns, tokens: np.ndarray, config: dict[str, Any], tags: dict[str, str]) -> np.ndarray:
    recorded = columns.filled("progress/exaflops")
    try:
        per_token = float(tags["flops_per_token"])
    except (KeyError, ValueError):
        per_token = training_flops(config) or np.nan
    return with_gaps_filled(recorded, tokens * per_token / 1e18)


def with_gaps_filled(recorded: np.ndarray, computed: np.ndarray) -> np.ndarray:
    """Return what was recorded, [N], and where that is NaN, before a run recorded it, what was computed, [N]."""
    return np.where(np.isnan(recorded), computed, recorded)


def _events(operations: list[Operation], starts: list[RunStart], columns: Columns) -> list[Event]:
    """Return the events of the journal, and before the first what the other records of an earlier version tell."""
    events = [one for one in operations if isinstance(one, Event)]
    first = min((event.time for event in events), default=np.inf)
    before = [start for start in starts if start.time <= first]
    events += [
        Event(start.time, start.resumed_step, "resume", f"resumed at step {start.resumed_step}")
        for start in (before[:-1] if events else before)  # the last one's process has recorded the first event
        if start.resumed_step is not None
    ]
    rows, counts = columns.points("optim/skipped_steps")
    grown = (np.diff(counts, prepend=0.0) > 0) & (columns.times[rows] <= first)
    events += [
        Event(float(columns.times[row]), int(columns.steps[row]), "skipped", f"step {columns.steps[row]} skipped")
        for row in rows[grown]
    ]
    return sorted(events, key=lambda event: (event.time, event.step))
