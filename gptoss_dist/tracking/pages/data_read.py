"""Which data a run has read: its sources, their shares of the tokens, and how often each was read through."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from gptoss_dist.tracking.pages.curves import layout_of
from gptoss_dist.tracking.pages.overview import si
from gptoss_dist.tracking.pages.skeleton import COLOURS, escaped, figure_html, list_html, table_html
from gptoss_dist.tracking.pages.thinning import rounded, thin
from gptoss_dist.tracking.recorded.run import RecordedRun

_SHARE = re.compile(r"data/(.+)_share")
_BINS = 300


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
    weights = {str(source.get("name")): source for source in _configured(run)}
    total = float(np.nanmax(run.tokens, initial=0.0))
    rows = []
    for name in names:
        share, epochs = _last(run, f"data/{name}_share"), _last(run, f"data/{name}_epochs")
        source = weights.get(name, {})
        rows.append(
            (
                name,
                source.get("path", ""),
                _number(source.get("weight")),
                f"{100 * share:.2f} %" if share is not None else "–",
                f"{si(total * share)}" if share is not None and total else "–",
                _number(epochs),
            )
        )
    return table_html(("source", "folder", "weight", "read", "tokens", "epochs"), rows)


def _one_source(run: RecordedRun) -> str:
    name, total = run.dataset.get("name", "the data"), float(np.nanmax(run.tokens, initial=0.0))
    epochs = _last(run, "data/epochs")
    return table_html(("source", "folder", "tokens", "epochs"), [(name, _path(run), si(total), _number(epochs))])


def _path(run: RecordedRun) -> str:
    return str(run.config.get("data.path") or run.dataset.get("source", ""))


def _origin(run: RecordedRun) -> str:
    if not (digest := run.dataset.get("digest")):
        return ""
    return f"<p>Digest of the manifests: <code>{escaped(digest)}</code></p>"


def _configured(run: RecordedRun) -> list[dict[str, Any]]:
    sources = run.config.get("data.sources")
    found = [source for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
    return [{"name": str(source.get("path", "")).rstrip("/").rpartition("/")[2], **source} for source in found]


def shares(run: RecordedRun, names: list[str]) -> dict[str, Any] | None:
    """Return the shares of the sources of all tokens read so far, stacked, over steps."""
    values_SN = np.stack([run.columns[f"data/{name}_share"] for name in names])
    known = np.isfinite(values_SN).all(axis=0)
    values_SN, steps = values_SN[:, known], run.columns.steps[known]
    if not len(steps):
        return None
    last = thin(values_SN[0], _BINS).last
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "stackgroup": "shares",
            "name": name,
            "line": {"width": 0.5, "color": COLOURS[number % len(COLOURS)]},
            "x": steps[last],
            "y": rounded(100 * values[last], 4),
            "hovertemplate": "%{y:.2f} %, step %{x}",
        }
        for number, (name, values) in enumerate(zip(names, values_SN))
    ]
    layout = layout_of("share of each source in all tokens so far (%)", "steps", range=[0, 100])
    return {"data": traces, "layout": layout}


def _last(run: RecordedRun, name: str) -> float | None:
    _, values = run.columns.points(name)
    return float(values[-1]) if len(values) else None


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else "–"
