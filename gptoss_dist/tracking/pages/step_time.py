"""Where the time of a run went: the parts of its steps, and what it did between them.

A step is waiting for data, forward and backward passes, the optimizer, and a rest (reading results back). Time in
all-to-alls is part of the passes and shown by itself; waiting for slower ranks in them is included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gptoss_dist.tracking.about.formats import duration
from gptoss_dist.tracking.pages.curves import layout_of
from gptoss_dist.tracking.pages.skeleton import COLOURS, figure_html, table_html
from gptoss_dist.tracking.pages.thinning import bins, means, rounded, warmed_up
from gptoss_dist.tracking.recorded.run import RecordedRun

_BINS = 300


def step_parts(run: RecordedRun) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the rows of timed steps, int64 [M], and milliseconds of each part in each of them, float64 [M].

    The parts add up to `perf/step_ms`: where more was measured, as parts overlap, all of them are scaled down. The
    first step of each process, which warms up, is left out.
    """
    columns = run.columns
    rows, whole = columns.points("perf/step_ms")
    keep = np.isfinite(whole) & warmed_up(columns.steps[rows], columns.resumes)
    rows, whole = rows[keep], np.maximum(whole[keep], 0.0)

    def of(name: str) -> np.ndarray:
        values = columns[name][rows] if name in columns else np.zeros(len(rows))
        return np.maximum(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0), 0.0)

    exchange = np.minimum(of("perf/all_to_all_ms"), of("perf/compute_ms"))
    parts = {
        "waiting for data": of("perf/data_ms"),
        "forward and backward": of("perf/compute_ms") - exchange,
        "all-to-all": exchange,
        "optimizer": of("perf/optimizer_ms"),
    }
    measured = sum(parts.values(), np.zeros(len(rows)))
    scale = np.where(measured > whole, whole / np.where(measured > 0, measured, 1.0), 1.0)
    parts = {name: scale * values for name, values in parts.items()}
    parts["rest"] = np.maximum(whole - measured, 0.0)
    return rows, {name: values for name, values in parts.items() if values.any()}


def step_time_html(run: RecordedRun) -> str:
    """Return a chart of the parts of a step over time and a table of where the time went."""
    rows, parts = step_parts(run)
    if not len(rows):
        return "<p>No step was timed yet.</p>"
    total = sum(float(values.sum()) for values in parts.values())
    late = {name: values[len(values) // 2 :] for name, values in parts.items()}
    late_total = sum(float(values.mean()) for values in late.values())
    table = [
        (
            name,
            f"{values.mean():,.1f}",
            f"{100 * values.sum() / total:.1f} %" if total else "–",
            f"{late[name].mean():,.1f}",
            f"{100 * late[name].mean() / late_total:.1f} %" if late_total else "–",
        )
        for name, values in parts.items()
    ]
    table.append(("step", f"{total / len(rows):,.1f}", "100.0 %", f"{late_total:,.1f}", "100.0 %"))
    headers = ("part of a step", "mean, ms", "share", "second half, ms", "share there")
    return "\n".join(
        [
            figure_html(breakdown(run.columns.steps[rows], parts), height=320),
            table_html(headers, table),
            table_html(("time of training", "", "share"), list(_between(run, total))),
        ]
    )


def breakdown(steps: np.ndarray, parts: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the parts of steps stacked over time, each point the mean of some steps.

    Args:
        steps: int64 [M].
        parts: Milliseconds of each part, float64 [M].
    """
    first, last = bins(len(steps), _BINS)
    traces = [
        {
            "type": "scatter",
            "mode": "lines" if len(first) > 1 else "markers",
            "stackgroup": "parts",
            "name": name,
            "line": {"width": 0.5, "color": COLOURS[number % len(COLOURS)]},
            "x": steps[last],
            "y": rounded(means(values, first), 4),
            "hovertemplate": "%{y:.4g} ms, step %{x}",
        }
        for number, (name, values) in enumerate(parts.items())
    ]
    return {"data": traces, "layout": layout_of("time of a step (ms, mean)", "steps", rangemode="tozero")}


def _between(run: RecordedRun, steps_ms: float) -> Iterator[tuple[str, str, str]]:
    """Yield where the whole time of the run's processes went: steps that count, checkpoints, tasks, and the rest."""
    hours = run.hours[np.isfinite(run.hours)]
    whole = 3600 * float(hours.max(initial=0.0))
    known = {
        "steps that count": steps_ms / 1e3,
        "waiting for checkpoints": _sum(run, "perf/checkpoint_pause_s"),
        "evaluation tasks": _sum(run, "perf/evaluation_s"),
    }
    for name, seconds in known.items():
        if seconds:
            yield name, duration(seconds), f"{100 * seconds / whole:.1f} %" if whole else "–"
    rest = whole - sum(known.values())
    if rest > 0:
        what = "start, validation, samples, plots, lost steps"
        yield what, duration(rest), f"{100 * rest / whole:.1f} %"
    yield "all", duration(whole), "100.0 %"


def _sum(run: RecordedRun, name: str) -> float:
    _, values = run.columns.points(name)
    return float(values[np.isfinite(values)].sum())
