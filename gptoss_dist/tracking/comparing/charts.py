"""The figures of a comparison, as plain data for plotly.js: curves over each axis, with a switch, and fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptoss_dist.tracking.comparing.equal import TRAIN
from gptoss_dist.tracking.comparing.fits import CONFIDENCE, Fit
from gptoss_dist.tracking.comparing.runs import AXES, ComparedRun, RunEvent
from gptoss_dist.tracking.comparing.smoothing import FEWEST, HALF_WIDTH, smooth_curve
from gptoss_dist.tracking.pages.skeleton import COLOURS
from gptoss_dist.tracking.pages.thinning import MOST_POINTS, rounded, thin
from gptoss_dist.tracking.recorded.columns import is_validation

_ALL_POINTS = 40_000
"""Of all runs together: beyond that a page gets slow."""
_FEWEST_POINTS = 120
MOST_WITH_DETAILS = 12
"""Runs, at most, whose raw losses and validations are drawn; more would hide each other."""
_MOST_WORDS = 6
"""Events of a run that are named where they are."""
_DASHES = ("solid", "dash", "dot", "dashdot")
SHOWN_EVENTS = {
    "resume": "resumed",
    "rewind": "went back",
    "skipped": "skipped step",
    "data": "data changed",
    "stop": "stopped",
    "error": "error",
}
"""Kinds of events that are shown, and their words."""


def loss_figure(runs: list[ComparedRun]) -> dict[str, Any]:
    """Return the losses of all runs: raw ones faint, smoothed ones as lines, validations as points, events as marks."""
    traces = _Traces(runs)
    visible = []
    for number, run in enumerate(runs):
        x, y = run.curve(TRAIN, "steps")
        if not len(x):
            continue
        line = _line(number)
        most = _points(len(runs))
        if len(runs) <= MOST_WITH_DETAILS:
            thinned = thin(y, most // 2)
            if thinned.is_whole:
                at, raw = thinned.last, thinned.mean
            else:  # from the least to the greatest of each bin: a band
                at, raw = np.repeat(thinned.last, 2), np.stack([thinned.low, thinned.high], axis=1).ravel()
            traces.add(
                run, _rows(run, x[at]), raw, mode="lines", line={**line, "width": 1}, opacity=0.25, hoverinfo="skip"
            )
        at = thin(y, most).last
        rows, smooth = _rows(run, x[at]), smooth_curve(x, y, x[at], _half_widths(x[at], len(x)))
        visible.append(smooth[len(smooth) // 20 :])
        traces.add(run, rows, smooth, mode="lines", line={**line, "width": 2}, legend=True)
        if len(runs) <= MOST_WITH_DETAILS and len(validated := _add_validations(traces, run, line)):
            visible.append(validated)
        _add_events(traces, run, rows, smooth, line)
    layout = traces.layout("loss (nats)")
    if visible:
        values = np.concatenate(visible)
        margin = 0.06 * float(np.ptp(values)) or 0.1
        layout["yaxis"]["range"] = [float(values.min()) - margin, float(values.max()) + margin]
    return {"data": traces.data, "layout": layout}


def metric_figure(runs: list[ComparedRun], metric: str, words: str) -> dict[str, Any] | None:
    """Return the smoothed curves of another metric, in the colours of `loss_figure`; None if no run logged it."""
    traces = _Traces(runs)
    for number, run in enumerate(runs):
        x, y = run.curve(metric, "steps")
        if len(x):
            at = thin(y, min(400, _points(len(runs)))).last
            smooth = smooth_curve(x, y, x[at], _half_widths(x[at], len(x)))
            traces.add(run, _rows(run, x[at]), smooth, mode="lines", line={**_line(number), "width": 2})
    return {"data": traces.data, "layout": traces.layout(words)} if traces.data else None


def fit_figure(fit: Fit, predictions: list[float]) -> dict[str, Any]:
    """Return the points of a fit, its law with the interval around it, and what it predicts."""
    largest = max([float(fit.compute.max()), *predictions])
    compute = np.geomspace(float(fit.compute.min()) / 1.5, largest * 1.5, 120)
    laws = [fit.predict(float(place)) for place in compute]
    colour = COLOURS[0]

    def line(values: list[float], **style: Any) -> dict[str, Any]:
        return {"x": rounded(compute), "y": rounded(np.array(values)), "mode": "lines", **style}

    def points(x: Sequence[float], y: Sequence[float], name: str, **style: Any) -> dict[str, Any]:
        return {"x": rounded(np.array(x)), "y": rounded(np.array(y)), "mode": "markers", "name": name, **style}

    band = {"line": {"width": 0}, "hoverinfo": "skip"}
    filled = {
        "fill": "tonexty",
        "fillcolor": "rgba(59,130,196,.18)",
        "name": f"{100 * CONFIDENCE:.0f} % interval of the law",
    }
    data = [
        line([law.low for law in laws], showlegend=False, **band),
        line([law.high for law in laws], **band, **filled),
        line([law.value for law in laws], line={"color": colour, "width": 2}, name="E + A C^-alpha"),
        points(fit.compute.tolist(), fit.loss.tolist(), "runs", text=fit.names, marker={"color": colour, "size": 9}),
    ]
    if asked := [fit.predict_run(place) for place in predictions]:
        marker = {"color": COLOURS[1], "size": 9, "symbol": "diamond"}
        error = {
            "array": [one.high - one.value for one in asked],
            "arrayminus": [one.value - one.low for one in asked],
        }
        data.append(
            points(predictions, [one.value for one in asked], "predicted, one run", marker=marker, error_y=error)
        )
    axes = {
        "xaxis": {"title": {"text": "exaFLOPs"}, "type": "log", "exponentformat": "power"},
        "yaxis": {"title": {"text": "loss (nats)"}},
    }
    return {"data": data, "layout": {**axes, "margin": _MARGIN, "legend": _LEGEND}}


_MARGIN = {"l": 70, "r": 20, "t": 60, "b": 60}
_LEGEND = {"orientation": "h", "y": -0.2}


class _Traces:
    """Traces whose places are known on several axes, between which buttons switch."""

    def __init__(self, runs: list[ComparedRun]) -> None:
        self.data: list[dict[str, Any]] = []
        self._axes = [
            axis for axis in AXES if any(np.isfinite(run.axis(axis)).any() for run in runs) or axis == "steps"
        ]
        self._places: dict[str, list[np.ndarray]] = {axis: [] for axis in self._axes}

    def add(self, run: ComparedRun, rows: np.ndarray, y: np.ndarray, *, legend: bool = False, **style: Any) -> None:
        """Add a trace of a run, at rows of it."""
        for axis in self._axes:
            self._places[axis].append(rounded(run.axis(axis)[rows]))
        name = run.name.replace("<", "&lt;")  # plotly.js takes some tags for its own
        trace = {"y": rounded(y), "name": name, "legendgroup": name, "showlegend": legend, **style}
        self.data.append({"x": self._places[self._axes[0]][-1], **trace})

    def layout(self, words: str) -> dict[str, Any]:
        """Return the layout, with a button for each axis, and two for its kind."""
        buttons = [
            {
                "label": AXES[axis],
                "method": "update",
                "args": [{"x": self._places[axis]}, {"xaxis.title.text": AXES[axis], "xaxis.autorange": True}],
            }
            for axis in self._axes
        ]
        kinds = [
            {"label": kind, "method": "relayout", "args": [{"xaxis.type": kind, "xaxis.autorange": True}]}
            for kind in ("linear", "log")
        ]
        menu = {"type": "buttons", "direction": "right", "y": 1, "yanchor": "bottom", "pad": {"t": 0, "b": 10}}
        return {
            "xaxis": {"title": {"text": AXES[self._axes[0]]}},
            "yaxis": {"title": {"text": words}},
            "updatemenus": [
                {**menu, "buttons": buttons, "x": 0, "xanchor": "left"},
                {**menu, "buttons": kinds, "x": 0.38, "xanchor": "left"},
            ],
            "margin": _MARGIN,
            "legend": _LEGEND,
            "hovermode": "closest",
        }


def _add_validations(traces: _Traces, run: ComparedRun, line: dict[str, Any]) -> np.ndarray:
    """Draw the validation losses, and return those after training began."""
    drawn = np.empty(0)
    for name in sorted(filter(is_validation, run.series)):
        if name != "loss/val" and "loss/val" in run.series:
            continue
        series = run.series[name]
        finite = np.isfinite(series.values)
        rows, values = series.rows[finite], series.values[finite]
        drawn = np.append(drawn, values[run.steps[rows] > 0])
        traces.add(
            run,
            rows,
            values,
            mode="lines+markers",
            line={"color": line["color"], "width": 1, "dash": "dot"},
            marker={"color": line["color"], "size": 7},
            hovertemplate=f"%{{y:.4f}} {name}",
        )
    return drawn


def _add_events(traces: _Traces, run: ComparedRun, rows: np.ndarray, smooth: np.ndarray, line: dict[str, Any]) -> None:
    """Mark what happened to the run, on its smoothed curve; what happened at one step has one mark."""
    by_step: dict[int, list[RunEvent]] = {}
    for event in [event for event in run.events if event.kind in SHOWN_EVENTS][:100]:
        by_step.setdefault(event.step, []).append(event)
    if not by_step:
        return
    steps = np.array(list(by_step))
    at = np.minimum(np.searchsorted(run.steps, steps), len(run.steps) - 1)
    traces.add(
        run,
        at,
        np.interp(at, rows, smooth),
        mode="markers+text" if len(by_step) <= _MOST_WORDS else "markers",
        marker={"color": line["color"], "size": 11, "symbol": "x", "line": {"width": 1, "color": "#808080"}},
        text=[", ".join(dict.fromkeys(SHOWN_EVENTS[event.kind] for event in events)) for events in by_step.values()],
        textposition="top center",
        hovertext=[
            "<br>".join(f"step {step}: {event.text}"[:200].replace("<", "&lt;") for event in events)
            for step, events in by_step.items()
        ],
        hoverinfo="text+name",
    )


def _rows(run: ComparedRun, steps: np.ndarray) -> np.ndarray:
    """Return which rows of a run are those of its steps."""
    return np.searchsorted(run.steps, steps.astype(np.int64))


def _half_widths(places: np.ndarray, count: int) -> np.ndarray:
    """Return the windows of the tables, over steps."""
    return np.maximum(HALF_WIDTH * places, FEWEST / 2 * max(1.0, float(places[-1]) / max(count, 1)))


def _points(runs: int) -> int:
    return int(np.clip(_ALL_POINTS // max(runs, 1), _FEWEST_POINTS, MOST_POINTS))


def _line(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "dash": _DASHES[number // len(COLOURS) % len(_DASHES)]}
