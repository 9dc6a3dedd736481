"""Curves of a run over steps, tokens, model FLOPs or hours; one switch changes the axis of all of them.

Every trace has its positions on each axis in `meta`, and the switch puts those of one axis into `x`.

Shapes: N steps of the run, B bins that a curve is thinned to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptoss_dist.tracking.live.curve import EARLY, limits
from gptoss_dist.tracking.pages.overview import events_of
from gptoss_dist.tracking.pages.skeleton import COLOURS, escaped, figure_html
from gptoss_dist.tracking.pages.thinning import averaged, rounded, thin, warmed_up
from gptoss_dist.tracking.recorded.columns import is_validation
from gptoss_dist.tracking.recorded.run import RecordedRun

BINS = 700
_MARKED = ("resume", "rewind", "skipped", "data")
"""Kinds of events that are marked in curves."""
_MOST_MARKS = 100
_MOST_LABELS = 12
"""Marks that are named in the curve; more of them are named by a pointer only."""
_AVERAGED_PARTS = 25
"""The line is an average over one of so many parts of a curve."""


@dataclass(frozen=True)
class Axis:
    """A horizontal axis."""

    key: str
    title: str
    positions: np.ndarray
    """Of each row of the run's columns, float64 [N]."""


def axes_of(run: RecordedRun) -> list[Axis]:
    """Return the axes that the run can be drawn over; the first is the one to begin with. Steps are always there."""
    flops, unit = _scaled(run.exaflops, ((1.0, "exaFLOPs"), (1e3, "petaFLOPs"), (1e6, "teraFLOPs"), (1e9, "gigaFLOPs")))
    hours, clock = _scaled(run.hours, ((1.0, "hours"), (60.0, "minutes")))
    steps = run.columns.steps
    found = [
        # Step 0, a validation before training, has seen no token.
        Axis("tokens", "tokens", np.where(steps == 0, 0.0, run.tokens)),
        Axis("steps", "steps", steps.astype(np.float64)),
        Axis("flops", f"model FLOPs ({unit})", np.where(steps == 0, 0.0, flops)),
        Axis("hours", f"{clock} of training", hours),
    ]
    return [axis for axis in found if np.isfinite(axis.positions).any()]


def _scaled(values: np.ndarray, units: Sequence[tuple[float, str]]) -> tuple[np.ndarray, str]:
    """Return values in the first unit in which the greatest is at least 1, or in the last one."""
    greatest = float(np.nanmax(values, initial=0.0))
    factor, unit = next(((f, u) for f, u in units if greatest * f >= 1), units[-1])
    return values * factor, unit


@dataclass(frozen=True)
class Chart:
    """One chart of the page."""

    title: str
    metrics: Sequence[tuple[str, str]]
    """Names of metrics, and what the legend calls each."""
    has_band: bool = True
    """Show the range of the values in each bin around their mean."""
    points: Sequence[tuple[str, str]] = ()
    """Metrics that are measured now and then, shown with a mark at each."""
    scale: float = 1.0
    is_log: bool = False
    from_zero: bool = False
    warms_up: bool = False
    """Leave out the first step of each process."""
    cut: bool = False
    """Leave out the height from which the curve falls, and mark where it rises far above its range later."""


SMALL = (
    Chart("learning rate", [("optim/lr", "learning rate")], has_band=False, from_zero=True),
    Chart("gradient norm before clipping", [("optim/grad_norm", "gradient norm")], is_log=True),
    Chart("throughput (tokens/s)", [("perf/tokens_per_s", "tokens/s")], from_zero=True, warms_up=True),
    Chart("MFU (%, model FLOPs)", [("perf/mfu", "MFU")], scale=100.0, from_zero=True, warms_up=True),
    Chart(
        "memory of rank 0 (GiB)",
        [
            ("perf/memory_rss_gib", "host"),
            ("perf/memory_allocated_gib", "device"),
            ("perf/memory_peak_allocated_gib", "device, peak"),
        ],
        has_band=False,
        from_zero=True,
    ),
    Chart("auxiliary losses", [("loss/aux", "balance (1 is even)"), ("loss/z", "router z")], has_band=False),
)


def curves_html(run: RecordedRun) -> str:
    """Return the switch of the axis, the curve of the loss, and smaller charts of what was recorded."""
    axes = axes_of(run)
    sources = sorted(name for name in run.columns if is_validation(name) and name != "loss/val")
    loss = Chart(
        "loss (nats per token; the band is the range, the line the mean)",
        [("loss/train", "training")],
        points=[("loss/val", "validation"), *((name, f"validation, {name[len('loss/val_') :]}") for name in sources)],
        cut=True,
    )
    parts = [_switch_html(axes)]
    if (figure := chart(run, axes, loss)) is not None:
        parts.append(figure_html(figure, height=440))
    small = [figure_html(figure, height=270) for one in SMALL if (figure := chart(run, axes, one)) is not None]
    parts.append(f'<div class="grid">{"".join(small)}</div>')
    return "\n".join(parts)


def chart(run: RecordedRun, axes: Sequence[Axis], chart: Chart) -> dict[str, Any] | None:
    """Return a chart as plotly.js takes it, None if nothing of it was recorded."""
    traces: list[dict[str, Any]] = []
    ranges: list[tuple[float, float]] = []
    series: list[_Series] = []
    names = [(name, label) for name, label in chart.metrics if name in run.columns]
    for number, (name, label) in enumerate(names):
        rows, values = _points(run, name, chart)
        if len(rows):
            traces += _curve(axes, run, rows, values, label, COLOURS[number], chart.has_band)
            ranges.append(limits(values) if chart.cut else (values.min(), values.max()))
            series.append(_Series(rows, values, label, COLOURS[number]))
    for number, (name, label) in enumerate(chart.points, 1):
        rows, values = _points(run, name, chart)
        if len(rows):
            colour = COLOURS[number % len(COLOURS)]
            traces.append(_marked(axes, run, rows, values, label, colour))
            ranges.append(limits(values, is_sparse=True) if chart.cut else (values.min(), values.max()))
            series.append(_Series(rows, values, label, colour))
    if not ranges:
        return None
    low, high = float(min(low for low, _ in ranges)), float(max(high for _, high in ranges))
    if chart.cut:
        traces += [mark for one in series for mark in _above(axes, run, one, high)]
    traces += _marks(axes, run, 0.0 if chart.from_zero else low, high)
    layout = layout_of(chart.title, axes[0].title)
    layout["showlegend"] = len(names) + len(chart.points) > 1
    if chart.is_log and low > 0:
        layout["yaxis"] |= {"type": "log"}
    elif chart.from_zero:
        layout["yaxis"] |= {"rangemode": "tozero"}
    elif chart.cut and high > low:
        margin = 0.05 * (high - low)
        layout["yaxis"] |= {"range": [low - margin, high + margin]}
    return {"data": traces, "layout": layout}


def _points(run: RecordedRun, name: str, chart: Chart) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and finite values of a metric; on a logarithmic axis only those above 0."""
    rows, values = run.columns.points(name)
    keep = np.isfinite(values)
    if chart.is_log:
        keep &= values > 0
    if chart.warms_up:
        keep &= warmed_up(run.columns.steps[rows], run.columns.resumes)
    return rows[keep], values[keep] * chart.scale


def _at(axes: Sequence[Axis], rows: np.ndarray) -> dict[str, Any]:
    """Return where rows lie on the first axis, and in `meta` on each."""
    places = {axis.key: rounded(axis.positions[rows]) for axis in axes}
    return {"x": places[axes[0].key], "meta": places}


def _curve(
    axes: Sequence[Axis], run: RecordedRun, rows: np.ndarray, values: np.ndarray, label: str, colour: str, band: bool
) -> Iterator[dict[str, Any]]:
    """Yield the band of a curve and its line."""
    bins = thin(values, BINS)
    at = _at(axes, rows[bins.last])
    if band and not bins.is_whole:
        edge = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
        yield {**edge, **at, "y": rounded(bins.low)}
        yield {**edge, **at, "y": rounded(bins.high), "fill": "tonexty", "fillcolor": _faint(colour)}
    elif band and len(values) > 50:
        faint = {"width": 1, "color": _faint(colour, 0.45)}
        line = {"type": "scatter", "mode": "lines", "line": faint, "hoverinfo": "skip", "showlegend": False}
        yield {**line, **at, "y": rounded(values)}
    smooth = averaged(bins.mean, _AVERAGED_PARTS) if band else bins.mean
    yield {
        "type": "scatter",
        "mode": "lines" if len(rows) > 1 else "markers",
        "name": escaped(label),
        "line": {"width": 1.8, "color": colour},
        **at,
        "y": rounded(smooth),
        "customdata": run.columns.steps[rows[bins.last]],
        "hovertemplate": "%{y:.5g}, step %{customdata}<extra></extra>",
    }


def _marked(
    axes: Sequence[Axis], run: RecordedRun, rows: np.ndarray, values: np.ndarray, label: str, colour: str
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escaped(label),
        "line": {"width": 1.2, "color": colour},
        "marker": {"size": 6, "color": colour},
        **_at(axes, rows),
        "y": rounded(values),
        "customdata": run.columns.steps[rows],
        "hovertemplate": "%{y:.5g}, step %{customdata}<extra></extra>",
    }


@dataclass(frozen=True)
class _Series:
    """Values of a metric, and how they are drawn. M is their number."""

    rows: np.ndarray
    """int64 [M]."""
    values: np.ndarray
    """float64 [M]."""
    label: str
    colour: str


def _above(axes: Sequence[Axis], run: RecordedRun, series: _Series, high: float) -> Iterator[dict[str, Any]]:
    """Yield marks at the upper edge of a chart where values lie above it; not where a curve comes down at first."""
    bins = thin(series.values, BINS)
    over = bins.high > high
    over[: max(int(np.argmin(over)), int(np.searchsorted(bins.last, len(series.values) // EARLY)))] = False
    if not over.any():
        return
    rows = series.rows[bins.last[over]]
    yield {
        "type": "scatter",
        "mode": "markers",
        "name": escaped(f"{series.label}, above the chart"),
        "marker": {"size": 8, "symbol": "triangle-up", "color": series.colour},
        **_at(axes, rows),
        "y": rounded(np.full(len(rows), high)),
        "text": [f"up to {value:.5g}" for value in bins.high[over]],
        "customdata": run.columns.steps[rows],
        "hovertemplate": "%{text}, step %{customdata}<extra></extra>",
        "showlegend": False,
    }


def _marks(axes: Sequence[Axis], run: RecordedRun, low: float, high: float) -> Iterator[dict[str, Any]]:
    """Yield a trace of dotted lines where something happened, with its text."""
    events = [event for event in events_of(run) if event.kind in _MARKED][-_MOST_MARKS:]
    if not events:
        return
    rows = np.searchsorted(run.columns.steps, [event.step for event in events]).clip(0, len(run.columns.steps) - 1)
    at = _at(axes, np.repeat(rows, 3))
    for positions in at["meta"].values():
        positions[2::3] = np.nan  # a gap between two lines
    y = np.tile([low, high, np.nan], len(events))
    labels = ["", "", ""] * len(events)
    if len(events) <= _MOST_LABELS:
        labels[1::3] = [event.kind for event in events]
    texts = [f"{event.kind}, step {event.step}: {event.text}" for event in events]
    yield {
        "type": "scatter",
        "mode": "lines+text",
        "name": "events",
        "text": labels,
        "textposition": "top center",
        "textfont": {"size": 11, "color": "#8a94a3"},
        "cliponaxis": False,
        "line": {"width": 1, "color": "#8a94a3", "dash": "dot"},
        **at,
        "y": rounded(y),
        "hovertext": [escaped(text) for text in texts for _ in range(3)],
        "hoverinfo": "text",
        "showlegend": False,
    }


def layout_of(title: str, horizontal: str, /, **vertical: Any) -> dict[str, Any]:
    """Return the layout that all charts of the page begin with.

    Args:
        title: Of the chart.
        horizontal: Title of the horizontal axis.
        **vertical: What plotly.js is told of the vertical axis.
    """
    return {
        "title": {"text": title, "font": {"size": 14}, "x": 0, "xref": "paper"},
        "margin": {"l": 60, "r": 16, "t": 34, "b": 42},
        "xaxis": {"title": {"text": horizontal, "font": {"size": 12}}, "exponentformat": "SI"},
        "yaxis": {"exponentformat": "power"} | vertical,
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "modebar": {"orientation": "v", "bgcolor": "rgba(0,0,0,0)", "color": "#8a94a3", "activecolor": "#3b82c4"},
    }


def _faint(colour: str, opacity: float = 0.22) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _switch_html(axes: Sequence[Axis]) -> str:
    options = "".join(f'<option value="{escaped(axis.key)}">{escaped(axis.title)}</option>' for axis in axes)
    return f'<p class="switch"><label>over <select id="axis">{options}</select></label></p>\n<script>{_SWITCH}</script>'


_SWITCH = """
document.getElementById('axis').addEventListener('change', function () {
  var key = this.value, title = this.options[this.selectedIndex].text;
  document.querySelectorAll('.figure').forEach(function (place) {
    if (!place.data || !place.data.every(function (trace) { return trace.meta && trace.meta[key]; })) return;
    var x = place.data.map(function (trace) { return trace.meta[key]; });
    Plotly.update(place, {x: x}, {'xaxis.title.text': title, 'xaxis.autorange': true});
  });
});
"""
