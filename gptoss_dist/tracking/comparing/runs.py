"""The runs that are compared: what was recorded of each, and the axes that losses are put over."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data_pipeline.printable import shown
from gptoss_dist.tracking.pages.thinning import thin

AXES = {"tokens": "tokens", "exaflops": "exaFLOPs", "hours": "hours of training", "steps": "steps"}
"""What losses are put over, and its words."""


@dataclass(frozen=True)
class Series:
    """The values of one metric, where it was logged."""

    rows: np.ndarray
    """int64 [M]: which of the run's rows they belong to, in order, none twice."""
    values: np.ndarray
    """float64 [M]; infinite ones are kept, and NaN are left out."""


@dataclass(frozen=True)
class RunEvent:
    """Something that happened to a run."""

    step: int
    kind: str
    """start, resume, rewind, skipped, data, checkpoint, stop, end or error."""
    text: str


@dataclass(frozen=True)
class ComparedRun:
    """All that a comparison reads of a run. Shapes: N rows, one per step, in order."""

    name: str
    """Of its own among the runs that are compared."""
    source: str
    """Its folder, or its address in MLflow, as people may see it."""
    config: dict[str, str]
    """The settings, flat, as text."""
    tags: dict[str, str]
    dataset: dict[str, str]
    """Of its training data `name`, `digest` and `source`; empty if that is not known."""
    status: str
    steps: np.ndarray
    """int64 [N]."""
    axes: dict[str, np.ndarray]
    """float64 [N] each: `tokens` and `exaflops` so far, `hours` of training without pauses. NaN where not known."""
    series: dict[str, Series]
    """By the metric's name."""
    folder: Path | None = None
    """On this machine, if it is here."""
    events: list[RunEvent] = field(default_factory=list)
    run_id: str | None = None
    """MLflow's."""
    experiment: str | None = None
    """In MLflow, by name."""
    experiment_id: str | None = None
    """In MLflow, if it is known by its id."""
    changed: list[str] = field(default_factory=list)
    """Settings that a resume changed midway; `config` has their last values."""

    def axis(self, name: str) -> np.ndarray:
        """Return float64 [N], what axis `name` of `AXES` is in each row."""
        return self.steps.astype(np.float64) if name == "steps" else self.axes[name]

    def curve(self, metric: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
        """Return where a metric's finite values lie on an axis, and the values, float64 [M] both, in order.

        Both are empty if the metric or the axis is not known. They may be the run's own arrays, not to be written to.
        """
        series = self.series.get(metric)
        if series is None:
            return np.empty(0), np.empty(0)
        x, y = self.axis(axis), series.values
        if len(series.rows) < len(x):  # else it was logged in every row
            x = x[series.rows]
        known = np.isfinite(x) & np.isfinite(y)
        return (x, y) if known.all() else (x[known], y[known])

    def values(self, metric: str) -> np.ndarray:
        """Return the finite values of a metric, float64 [M], in order of steps; empty if it was never logged."""
        series = self.series.get(metric)
        return series.values[np.isfinite(series.values)] if series else np.empty(0)

    def at_most(self, axis: str, metric: str = "loss/train") -> float:
        """Return the largest value of an axis at which a metric is known; NaN if there is none."""
        x = self.curve(metric, axis)[0]
        return float(x[-1]) if len(x) else np.nan


def condensed(run: ComparedRun, whole: str, most: int) -> ComparedRun:
    """Return a run with fewer values, which is all that a picture needs.

    Args:
        run: The run.
        whole: Metrics whose names begin so keep every value.
        most: Values that others have at most; each is the mean of some.
    """
    series = {}
    for name, one in run.series.items():
        if name.startswith(whole):
            series[name] = Series(one.rows.astype(np.int32), one.values)
        else:
            finite = np.flatnonzero(np.isfinite(one.values))
            thinned = thin(one.values[finite], most)
            series[name] = Series(one.rows[finite[thinned.last]].astype(np.int32), thinned.mean)
    return replace(run, series=series)


def with_own_names(runs: list[ComparedRun]) -> list[ComparedRun]:
    """Return the runs with names that differ: those that share one get the folder above it, or a number."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        parents = [Path(run.source).parent.name for run in runs]
        names = [f"{up}/{name}" if names.count(name) > 1 and up else name for name, up in zip(names, parents)]
    names = [shown(name) for name in names]
    taken: set[str] = set()
    own = []
    for run, name in zip(runs, names):
        numbered = (f"{name} ({number})" for number in range(2, len(runs) + 2))
        free = name if name not in taken else next(one for one in numbered if one not in taken and one not in names)
        taken.add(free)
        own.append(replace(run, name=free))
    return own


def series_of(column: np.ndarray) -> Series:
    """Return a column with a value for each row, NaN where there is none, as the values alone."""
    rows = np.flatnonzero(~np.isnan(column))
    return Series(rows, column[rows])


def number_of(text: str | None, otherwise: float = np.nan) -> float:
    """Return the number in a text; `otherwise` if there is none."""
    try:
        return float(text) if text else otherwise
    except ValueError:
        return otherwise
