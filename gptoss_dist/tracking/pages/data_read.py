"""Which data a run has read: its sources, their shares of the tokens, and how often each was read through.

A run logs the share of each source in the tokens *since its mixture began*. Where the data were changed on a resume,
the shares begin anew, so what was read before is kept and the rest is added to it:

    steps 1 to 100     web 0.5, code 0.5          100 tokens: web 50, code 50
    steps 101 to 200   web 0.2, books 0.8         100 tokens more: web 50 + 20, code 50, books 80

Shapes: S sources, R rows of the run's columns.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_dist.tracking.about.formats import amount
from gptoss_dist.tracking.pages.curves import layout_of
from gptoss_dist.tracking.pages.skeleton import COLOURS, escaped, figure_html, list_html, table_html
from gptoss_dist.tracking.pages.thinning import bins, rounded
from gptoss_dist.tracking.recorded.run import RecordedRun

_SHARE = re.compile(r"data/(.+)_share")
_BINS = 300
_ROUNDING = 1e-4
"""Of all tokens: what shares do not add up to."""


def data_html(run: RecordedRun) -> str:
    """Return a table of the sources that were read, the course of their shares, and the changes of the data."""
    names = sorted(found[1] for name in run.columns if (found := _SHARE.fullmatch(name)))
    parts = [_table(run, names) if names else _one_source(run)]
    if len(names) > 1 and (figure := shares(run, names)) is not None:
        parts.append(figure_html(figure, height=300))
    changes = [value for key, value in sorted(run.tags.items()) if key.startswith("data.change.")]
    if changes:
        parts.append("<h3>Changes</h3>" + list_html(changes))
    parts.append(_origin(run))
    return "\n".join(parts)


def _table(run: RecordedRun, names: list[str]) -> str:
    weights = {str(source["name"]): source for source in _configured(run)}
    _, read_SR = tokens_read(run, names)
    read_S = read_SR[:, -1] if read_SR.size else np.zeros(len(names))
    counted = run.tokens[np.isfinite(run.tokens)]
    read = float(read_S.sum())
    total = max(float(counted.max(initial=0.0)), read) if _changes(run) else read
    rows = []
    for name, tokens in zip(names, read_S):
        share, source = tokens / total if total else None, weights.get(name, {})
        rows.append(
            (
                name,
                source.get("path", ""),
                _number(source.get("weight")),
                f"{100 * share:.2f} %" if share is not None else "–",
                amount(tokens) if share is not None and len(counted) else "–",
                _number(_last(run, f"data/{name}_epochs")),
            )
        )
    if len(counted) and total - read > _ROUNDING * total:
        rest = f"{100 * (1 - read / total):.2f} %", amount(total - read)
        rows.append(("one source by itself, before the data changed", "", "–", *rest, "–"))
    return table_html(("source", "folder", "weight", "read", "tokens", "epochs"), rows)


def _one_source(run: RecordedRun) -> str:
    name, total = run.dataset.get("name", "the data"), float(np.nanmax(run.tokens, initial=0.0))
    epochs = _last(run, "data/epochs")
    return table_html(("source", "folder", "tokens", "epochs"), [(name, _path(run), amount(total), _number(epochs))])


def _path(run: RecordedRun) -> str:
    return str(run.config.get("data.path") or run.dataset.get("source", ""))


def _origin(run: RecordedRun) -> str:
    if not (digest := run.dataset.get("digest")):
        return ""
    return f"<p>Digest of the manifests: <code>{escaped(digest)}</code></p>"


def _configured(run: RecordedRun) -> list[dict[str, Any]]:
    sources = run.config.get("data.sources")
    found = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    return [source | {"name": source.get("name") or Path(str(source.get("path", ""))).name} for source in found]


def tokens_read(run: RecordedRun, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return how many tokens of each source were read up to each row that says so; 0 of one that has not come yet.

    Args:
        run: The run. If it has not counted its tokens, its steps stand for them.
        names: Of the sources, S.

    Returns:
        Rows of the run's columns, int64 [R], and tokens, float64 [S, R].
    """
    shares_SN = np.stack([run.columns[f"data/{name}_share"] for name in names])
    steps = run.columns.steps
    seen = run.tokens if np.isfinite(run.tokens).any() else steps.astype(np.float64)
    rows = np.flatnonzero(np.isfinite(shares_SN).any(axis=0) & np.isfinite(seen))
    shares_SR = np.clip(np.nan_to_num(shares_SN[:, rows]), 0.0, 1.0)
    read_SR, before_S = np.zeros_like(shares_SR), np.zeros(len(names))
    edges = np.searchsorted(steps[rows], [0, *_changes(run), np.inf], side="right")
    for begin, end, change in zip(edges, edges[1:], [0, *_changes(run)]):
        if begin < end:
            start = seen[: np.searchsorted(steps, change, side="right")]
            start = start[np.isfinite(start)]
            since_R = np.maximum(seen[rows[begin:end]] - (start[-1] if len(start) else 0.0), 0.0)
            read_SR[:, begin:end] = before_S[:, None] + shares_SR[:, begin:end] * since_R
            before_S = read_SR[:, end - 1]
    return rows, read_SR


def _changes(run: RecordedRun) -> list[int]:
    """Return the steps after which another mixture took over, in order; its weights may change without that."""
    found = [re.match(r"step (\d{1,12}):", text) for key, text in run.tags.items() if key.startswith("data.change.")]
    return sorted({int(one[1]) for one in found if one})


def shares(run: RecordedRun, names: list[str]) -> dict[str, Any] | None:
    """Return the shares of the sources of all tokens read so far, stacked, over steps."""
    rows, read_SR = tokens_read(run, names)
    total_R = read_SR.sum(axis=0)
    rows, read_SR, total_R = rows[total_R > 0], read_SR[:, total_R > 0], total_R[total_R > 0]
    if not len(rows):
        return None
    _, last = bins(len(rows), _BINS)
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "stackgroup": "shares",
            "name": escaped(name),
            "line": {"width": 0.5, "color": COLOURS[number % len(COLOURS)]},
            "x": run.columns.steps[rows[last]],
            "y": rounded(100 * read_R[last] / total_R[last], 4),
            "hovertemplate": "%{y:.2f} %, step %{x}",
        }
        for number, (name, read_R) in enumerate(zip(names, read_SR))
    ]
    layout = layout_of("share of each source in all tokens so far (%)", "steps", range=[0, 100])
    return {"data": traces, "layout": layout}


def _last(run: RecordedRun, name: str) -> float | None:
    _, values = run.columns.points(name)
    return float(values[-1]) if len(values) else None


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else "–"
