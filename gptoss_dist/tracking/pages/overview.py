"""What a run is and how it went, in figures, and what happened to it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

from gptoss_dist.planner.flops import MFU_CONVENTION
from gptoss_dist.tracking.about.formats import amount, duration, moment, si
from gptoss_dist.tracking.pages.skeleton import escaped, list_html, table_html
from gptoss_dist.tracking.recorded.run import RecordedRun
from gptoss_dist.tracking.records import Event

MOST_EVENTS = 200
"""Rows of the table of events; the others are counted."""


def summary_html(run: RecordedRun, state: str) -> str:
    """Return the figures that people ask for first, as cards, and a table of what the run is.

    Args:
        run: The run.
        state: In words, such as `finished at step 500`.
    """
    cards = "".join(
        f'<div class="card"><div class="value">{escaped(value)}</div><div class="name">{escaped(name)}</div></div>'
        for name, value in _cards(run)
    )
    rows = [("state", state), *_description(run)]
    return f'<div class="cards">{cards}</div>\n<div class="facts">{table_html(("", ""), rows)}</div>'


def _cards(run: RecordedRun) -> Iterator[tuple[str, str]]:
    columns = run.columns
    if (loss := last_mean(run, "loss/train")) is not None:
        yield f"training loss, mean of the last {loss[1]} steps", f"{loss[0]:.4f}"
    rows, values = columns.points("loss/val")
    if len(rows):
        best = int(np.argmin(values))
        yield f"best validation loss, step {columns.steps[rows[best]]:,}", f"{values[best]:.4f}"
        if best != len(rows) - 1:
            yield f"last validation loss, step {columns.steps[rows[-1]]:,}", f"{values[-1]:.4f}"
    if tokens := _last(run.tokens):
        yield "tokens", amount(tokens)
    if flops := _last(run.exaflops):
        yield "model FLOPs", f"{si(1e18 * flops)}FLOP"
    if (hours := _last(run.hours)) is not None:
        yield "time of training", duration(3600 * hours)
    if (rate := late_median(run, "perf/tokens_per_s")) is not None:
        yield "tokens per second, median of the second half", f"{rate:,.0f}"
    if (mfu := late_median(run, "perf/mfu")) is not None:
        yield "MFU (model FLOPs), median of the second half", f"{100 * mfu:.1f} %"


def _description(run: RecordedRun) -> Iterator[tuple[str, str]]:
    """Yield what the run is, what it did, and what it cost."""
    config, columns = run.config, run.columns
    steps = config.get("train.steps")
    last = int(columns.steps[-1]) if len(columns.steps) else 0
    yield "steps", f"{last:,} of {steps:,}" if isinstance(steps, int) else f"{last:,}"
    if run.starts:
        began, ended = run.starts[0].time, float(np.nanmax(columns.line_times, initial=run.starts[0].time))
        yield "began, last heard of", f"{moment(began)}, {moment(ended)}"
    model = [f"{config[f'model.{key}']} {word}" for key, word in _MODEL if f"model.{key}" in config]
    if model:
        yield "model", ", ".join(model)
    for name, tag in (("parameters", "model.params"), ("active parameters", "model.active_params")):
        if tag in run.tags:
            yield name, _whole(run.tags[tag])
    if run.dataset:
        yield "data", run.dataset.get("name", "")
    if "train.micro_batch_size" in config and "data.seq_len" in config:
        yield "samples", f"{config['data.seq_len']} tokens, {config['train.micro_batch_size']} per process and pass"
    yield "devices", f"{run.tags.get('world_size', '?')} x {run.tags.get('hardware', 'unknown hardware')}"
    if "layout" in run.tags:
        yield "layout", run.tags["layout"]
    if "perf/mfu" in columns:
        yield "MFU counts", f"{MFU_CONVENTION}; peak: {run.tags.get('mfu.peak', 'unknown')}"
    if (spent := device_hours(run)) is not None:
        yield "cost", f"{spent:.3g} device-hours"
    yield "stability", _stability(run)
    if run.run_id:
        yield "MLflow run", run.run_id


_MODEL = (
    ("num_hidden_layers", "layers"),
    ("hidden_size", "wide"),
    ("num_local_experts", "experts"),
    ("num_experts_per_tok", "of them per token"),
    ("vocab_size", "token ids"),
)


def _stability(run: RecordedRun) -> str:
    columns = run.columns
    skipped = _last(columns.filled("optim/skipped_steps")) or 0
    resumes, rewinds = _returns(run)
    _, norms = columns.points("optim/grad_norm")
    norms = norms[np.isfinite(norms)]
    parts = [
        counted(resumes, "resume"),
        counted(rewinds, "rewind"),
        counted(int(skipped), "skipped step"),
    ]
    if len(norms):
        parts.append(f"gradient norm {np.median(norms):.3g} (median), {norms.max():.3g} (greatest)")
    return ", ".join(parts)


def _returns(run: RecordedRun) -> tuple[int, int]:
    """Return how often the run was resumed, and how often it went back by itself.

    Both begin with a return to a checkpoint in the metrics. Earlier versions recorded no event of either.
    """
    kinds = Counter(event.kind for event in run.events)
    rewinds = max(int(_last(run.columns.filled("faults/rewinds")) or 0), kinds["rewind"])
    resumes = kinds["resume"] if run.starts else len(run.columns.resumes)
    return (resumes if kinds["rewind"] else max(0, resumes - rewinds)), rewinds


def events_html(run: RecordedRun) -> str:
    """Return a table of what happened to the run, in order of time; checkpoints are the first to be left out."""
    events = events_of(run)
    is_checkpoint = [event.kind == "checkpoint" for event in events]
    by_interest = sorted(range(len(events)), key=lambda at: (is_checkpoint[at], -at))
    shown = [events[at] for at in sorted(by_interest[:MOST_EVENTS])]
    rows = [(moment(event.time), f"{event.step:,}", event.kind, event.text) for event in shown]
    if not rows:
        return "<p>Nothing but steps: no resume, no skipped step, no change of the data.</p>"
    checkpoints = sum(is_checkpoint[at] for at in by_interest[MOST_EVENTS:])
    others = max(0, len(events) - MOST_EVENTS - checkpoints)
    left_out = [(checkpoints, "checkpoint"), (others, "earlier event")]
    note = " and ".join(counted(number, what) for number, what in left_out if number)
    return table_html(("time", "step", "what", ""), rows) + (list_html([f"{note} left out"]) if note else "")


def events_of(run: RecordedRun) -> list[Event]:
    """Return the events of a run in order of time; those that an earlier version did not record, as far as they show.

    Starts are in the journal, checkpoints in the time that they took, changes of the data and rewinds in tags.
    """
    events, columns = list(run.events), run.columns
    kinds = {event.kind for event in events}
    if "start" not in kinds:
        events += [Event(s.time, 0, "start", f"started as {s.run_name}") for s in run.starts if s.resumed_step is None]
    if "checkpoint" not in kinds:
        rows, seconds = columns.points("perf/checkpoint_pause_s")
        events += [
            Event(
                float(columns.times[row]), int(columns.steps[row]), "checkpoint", f"saved; steps waited {pause:.2f} s"
            )
            for row, pause in zip(rows, seconds)
        ]
    for kind, beginning in (("data", "data.change."), ("rewind", "spike.")):
        if kind not in kinds:
            events += [_tagged(run, kind, text) for key, text in run.tags.items() if key.startswith(beginning)]
    return sorted(events, key=lambda event: (event.time, event.step))


def _tagged(run: RecordedRun, kind: str, text: str) -> Event:
    """Return the event of a tag whose text names its step; its time is that of the next step that was recorded."""
    found = re.search(r"\bsteps? (\d{1,12})", text)
    step = int(found[1]) if found else 0
    row = min(int(np.searchsorted(run.columns.steps, step)), len(run.columns.steps) - 1)
    return Event(float(run.columns.times[row]), step, kind, text)


def last_mean(run: RecordedRun, name: str) -> tuple[float, int] | None:
    """Return the mean of a metric over its last steps (a hundredth of them, at least 50), and how many these are."""
    _, values = run.columns.points(name)
    values = values[np.isfinite(values)]
    last = values[-max(50, len(values) // 100) :]
    return (float(last.mean()), len(last)) if len(last) else None


def late_median(run: RecordedRun, name: str) -> float | None:
    """Return the median of a metric over the second half of the run, where nothing warms up any more."""
    _, values = run.columns.points(name)
    late = values[len(values) // 2 :]
    return float(np.median(late)) if len(late) else None


def device_hours(run: RecordedRun) -> float | None:
    """Return the time of training times the devices, in hours; None if the devices are unknown."""
    if (logged := _last(run.columns.filled("progress/gpu_hours"))) is not None:
        return logged
    hours, devices = _last(run.hours), run.tags.get("world_size", "")
    return hours * int(devices) if hours is not None and devices.isdecimal() else None


def _last(values: np.ndarray) -> float | None:
    """Return the last number of an array; None if there is none."""
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def counted(number: int, what: str) -> str:
    """Return `no resume`, `1 resume` or `3 resumes`."""
    return f"{number or 'no'} {what}{'s' if number > 1 else ''}"


def _whole(text: str) -> str:
    return f"{int(text):,}" if text.isdecimal() else text
