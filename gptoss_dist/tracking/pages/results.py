"""What the model wrote while it was trained, and what evaluations found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.foreign import read_bytes, read_json
from gptoss_dist.tracking.about.formats import moment
from gptoss_dist.tracking.live.follow import sample_files, texts_of
from gptoss_dist.tracking.pages.skeleton import escaped, table_html
from gptoss_dist.tracking.recorded.run import RecordedRun

_MOST_STEPS = 12
"""Samples that are shown, evenly over the run, the first and the last among them."""
_MOST_PROMPTS = 4
_MOST_CHARACTERS = 1200
"""Of a sample."""
_MOST_ROWS = 60
"""Of the table of an evaluation."""


def samples_html(run: RecordedRun, message: Callable[[str], None]) -> str:
    """Return what the model wrote, a row for each step and a column for each prompt."""
    assert run.folder is not None, "samples are files in the run's folder"
    try:
        files = sample_files(run.folder)
    except OSError as error:
        message(f"the samples cannot be read: {error}")
        files = {}
    if not files:
        return "<p>No samples were written (sampling.prompts).</p>"
    steps = sorted(files)
    if len(steps) > _MOST_STEPS:
        steps = [steps[round(n * (len(steps) - 1) / (_MOST_STEPS - 1))] for n in range(_MOST_STEPS)]
    rows = []
    for step in reversed(steps):
        try:
            texts = texts_of(read_bytes(files[step]).decode("utf-8", "replace"))
        except ValueError as error:
            message(str(error))
            continue
        cells = "".join(f"<td><pre>{escaped(_cut(text))}</pre></td>" for text in texts[:_MOST_PROMPTS])
        rows.append(f'<tr><td class="number">{step:,}</td>{cells}</tr>')
    note = f"{len(steps)} of {len(files)} steps with samples, the newest first." if len(files) > len(steps) else ""
    return (
        f'<p>{note}</p><div class="table samples"><table><thead><tr><th>step</th>'
        f'<th colspan="{_MOST_PROMPTS}">texts</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."


def evaluations_html(run: RecordedRun, message: Callable[[str], None]) -> str:
    """Return the results of tasks in the run, and a table of each evaluation of its checkpoints."""
    parts = [_tasks(run)] if any(name.startswith("eval/") for name in run.columns) else []
    assert run.folder is not None, "evaluations are files in the run's folder"
    for path in sorted((run.folder / "evaluations").glob("*/result.json")):
        try:
            result = read_json(path, dict[str, Any])
        except ValueError as error:
            message(str(error))
            continue
        parts.append(_evaluation(path, result))
    return "\n".join(parts) or "<p>None yet: <code>python launch/evaluate.py --help</code> lists what there is.</p>"


def _tasks(run: RecordedRun) -> str:
    """Return the metrics of tasks that were run in training, a column for each time."""
    columns = run.columns
    names = sorted(name for name in columns if name.startswith("eval/"))
    rows = sorted({int(row) for name in names for row in columns.points(name)[0]})[-8:]
    headers = ("task, metric", *(f"step {columns.steps[row]:,}" for row in rows))
    table = [(name.removeprefix("eval/"), *(_shown(float(columns[name][row])) for row in rows)) for name in names]
    return "<h3>Tasks in training</h3>" + table_html(headers, table)


def _evaluation(path: Path, result: dict[str, Any]) -> str:
    subject = result.get("subject")
    step = subject.get("step") if isinstance(subject, dict) else None
    title = f"{result.get('evaluation', path.parent.name)}, step {step}, {moment(path.stat().st_mtime)}"
    rows = result.get("rows")
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = table_html(names, ([_shown(row.get(name)) for name in names] for row in rows[:_MOST_ROWS]))
        more = f"<p>{len(rows) - _MOST_ROWS} more rows are in the file.</p>" if len(rows) > _MOST_ROWS else ""
    else:
        table, more = table_html(("metric", "value"), _metrics(result)), ""
    return f"<h3>{escaped(title)}</h3>{table}{more}<p><code>{escaped(path.parent.name)}/{path.name}</code></p>"


def _metrics(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    metrics = result.get("metrics")
    for name, value in metrics.items() if isinstance(metrics, dict) else ():
        yield str(name), _shown(value)


def _shown(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)
