"""A comparison as parts of texts and tables, and these as Markdown, as JSON and as a page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.printable import printable, shortened
from gptoss_dist.tracking.comparing import charts
from gptoss_dist.tracking.comparing.differences import ABSENT, Difference, Doubt
from gptoss_dist.tracking.comparing.equal import EqualTable, amount, place_in_words
from gptoss_dist.tracking.comparing.fits import CONFIDENCE, Fit
from gptoss_dist.tracking.comparing.runs import ComparedRun
from gptoss_dist.tracking.comparing.smoothing import FEWEST, HALF_WIDTH
from gptoss_dist.tracking.comparing.summary import RunSummary
from gptoss_dist.tracking.comparing.verdicts import Judgement, sentences
from gptoss_dist.tracking.pages.skeleton import Section, figure_html, html_page, list_html, paragraphs_html, table_html

_KEYS_AS_ROWS = 8
"""Runs, at most, that are columns of the table of differences; more are its rows."""
_LONGEST_CELL = 60
_MOST_EVENTS = 60


@dataclass(frozen=True)
class Comparison:
    """All that was found out about some runs."""

    name: str
    runs: list[ComparedRun]
    labels: list[str]
    """Of the groups of replicas."""
    groups: list[list[int]]
    """Runs with the same settings but for the seed, as indices."""
    differences: list[Difference]
    doubts: list[Doubt]
    tables: list[EqualTable]
    judgements: list[tuple[str, Judgement]]
    """By axis."""
    summaries: list[RunSummary]
    fit: Fit | None = None
    fit_note: str = ""
    """What was fitted, or why nothing was."""
    predictions: list[float] = field(default_factory=list)
    """Budgets in exaFLOPs."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """A part of the text of a comparison."""

    title: str
    texts: list[str] = field(default_factory=list)
    """Paragraphs."""
    bullets: list[str] = field(default_factory=list)
    """What comes before them, as a list."""
    tables: list[tuple[list[str], list[list[str]]]] = field(default_factory=list)
    """Headers and rows."""


def parts(found: Comparison) -> list[Part]:
    """Return the text of a comparison in its order: what to conclude first."""
    return [
        _conclusions(found),
        _settings(found),
        *(_equal(found, table) for table in found.tables),
        *_validations(found),
        _figures(found),
        *_events(found.runs),
        *([_fit(found)] if found.fit or found.fit_note else []),
        _method(),
    ]


def markdown(found: Comparison) -> str:
    """Return a comparison as Markdown."""
    lines = [f"# Comparison of {_text(found.name)}", "", _text(_data(found.runs)), ""]
    for part in parts(found):
        lines += [f"## {_text(part.title)}", ""]
        if part.bullets:
            lines += [*(f"- {_text(text)}" for text in part.bullets), ""]
        lines += [line for text in part.texts for line in (_text(text), "")]
        for headers, rows in part.tables:
            lines += [_row(headers), _row(["---"] * len(headers)), *map(_row, rows), ""]
    return "\n".join(lines)


def page(found: Comparison) -> str:
    """Return a comparison as an HTML page that needs no other file and no network."""
    sections = []
    for number, part in enumerate(parts(found)):
        body = (list_html(part.bullets) if part.bullets else "") + paragraphs_html(part.texts)
        body += "".join(table_html(headers, rows) for headers, rows in part.tables)
        if part.title == _FIT and found.fit:
            body += figure_html(charts.fit_figure(found.fit, found.predictions))
        sections.append(Section(part.title, body))
        if number == 0:
            sections.append(Section("Curves", _curves(found.runs)))
    return html_page(f"Comparison of {found.name}", sections, subtitle=_data(found.runs))


def as_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison as plain values; what is not known is None."""
    names = [run.name for run in found.runs]
    return _finite(
        {
            "name": found.name,
            "runs": [
                {"name": run.name, "source": run.source, "run_id": run.run_id, "group": _group(found, index)}
                for index, run in enumerate(found.runs)
            ],
            "differences": [dataclasses.asdict(one) for one in found.differences],
            "doubts": [one.text for one in found.doubts],
            "notes": found.notes,
            "equal": {
                table.axis: {
                    "places": table.places,
                    "half_widths": table.half_widths,
                    "train": {
                        name: [{"loss": one.value, "standard_error": one.error, "losses": one.count} for one in row]
                        for name, row in zip(names, table.train)
                    },
                    "validation": {metric: dict(zip(names, rows)) for metric, rows in table.validation.items()},
                }
                for table in found.tables
            },
            "verdicts": [
                {
                    "axis": axis,
                    "metric": judgement.metric,
                    "noise": judgement.noise,
                    "noise_std": judgement.noise_std,
                    "pairs": [
                        {**dataclasses.asdict(one), "shown": one.is_shown, "sentence": str(one)}
                        for one in judgement.verdicts
                    ],
                }
                for axis, judgement in found.judgements
            ],
            "summaries": [dataclasses.asdict(one) for one in found.summaries],
            "fit": _fit_json(found),
        }
    )


def _conclusions(found: Comparison) -> Part:
    bullets = [doubt.text for doubt in found.doubts]
    texts = []
    for axis, judgement in found.judgements:
        said = sentences(judgement)
        bullets += said if judgement.metric == "loss/train" else [f"{judgement.metric}: {text}" for text in said]
        texts.append(f"{judgement.metric} over {charts.AXES[axis]}: {judgement.noise}")
    bullets += _lowest_validation(found) + found.notes
    if len({judgement.noise for _, judgement in found.judgements}) == 1:
        texts = [found.judgements[0][1].noise]
    return Part("What to conclude", texts, bullets)


def _lowest_validation(found: Comparison) -> list[str]:
    """Return which run has the lowest validation loss at the last place in tokens, where no verdict says that."""
    table = next((table for table in found.tables if table.axis == "tokens"), None)
    judged = {judgement.metric: judgement for axis, judgement in found.judgements if axis == "tokens"}
    if table is None or set(judged) != {"loss/train"}:
        return []
    values = [row[-1] for row in table.validation.get("loss/val", [])]
    known = sorted((value, index) for index, value in enumerate(values) if math.isfinite(value))
    if len(known) < 2:
        return []
    (first, best), (second, other) = known[:2]
    text = (
        f"The lowest loss/val at {place_in_words(table.axis, table.places[-1])} is that of {found.runs[best].name}, "
        f"{first:.4f}; next is {found.runs[other].name}, {second:.4f} (between two validations, of unknown noise)."
    )
    if _group(found, best) != judged["loss/train"].verdicts[0].better:
        text += " By its training loss another one is the best: take neither for certain."
    return [text]


def _settings(found: Comparison) -> Part:
    if not found.differences:
        return Part("What differs", ["Nothing: settings, data, code and hardware are the same."])
    names = [run.name for run in found.runs]
    keys = [one.key for one in found.differences]
    values = [_told_apart(one.values) for one in found.differences]
    if len(names) <= _KEYS_AS_ROWS:
        return Part("What differs", tables=[(["", *names], [[key, *row] for key, row in zip(keys, values)])])
    columns = [[name, *(row[index] for row in values)] for index, name in enumerate(names)]
    return Part("What differs", tables=[(["", *keys], columns)])


def _told_apart(values: Sequence[str]) -> list[str]:
    """Return values as short as a table wants them, or whole where two of them would look the same."""
    short = [shortened(value, _LONGEST_CELL) for value in values]
    return short if len(set(short)) == len(set(values)) else list(values)


def _equal(found: Comparison, table: EqualTable) -> Part:
    headers = ["loss/train", *(place_in_words(table.axis, place) for place in table.places)]
    rows = [
        [run.name, *(f"{one.value:.4f} ± {one.error:.4f}" if one.is_known else ABSENT for one in row)]
        for run, row in zip(found.runs, table.train)
    ]
    tables = [(headers, rows)]
    for metric, values in table.validation.items():
        if table.axis == "tokens" and any(map(math.isfinite, np.ravel(values))):
            rows = [[run.name, *map(_loss, row)] for run, row in zip(found.runs, values)]
            tables.append(([metric, *headers[1:]], rows))
    title = {"tokens": "Loss at equal tokens", "exaflops": "Loss at equal FLOPs", "hours": "Loss at equal hours"}
    return Part(title[table.axis], tables=tables)


def _validations(found: Comparison) -> list[Part]:
    metrics = sorted({one.metric for summary in found.summaries for one in summary.validations})
    rows = []
    for summary in found.summaries:
        known = {one.metric: one for one in summary.validations}
        row = [summary.name]
        for metric in metrics:
            one = known.get(metric)
            row += [f"{one.best:.4f} (step {one.best_step})", f"{one.last:.4f}"] if one else [ABSENT, ABSENT]
        rows.append(row)
    headers = ["", *(f"{metric}, {kind}" for metric in metrics for kind in ("best", "last"))]
    return [Part("Best and last validation", tables=[(headers, rows)])] if metrics else []


def _figures(found: Comparison) -> Part:
    headers = ["", "state", "steps", "tokens", "exaFLOPs", "hours", "device-hours", "tokens/s", "MFU"]
    cost = [
        [
            one.name,
            one.status.lower() + (f", resumed {one.resumes} x" if one.resumes else ""),
            f"{one.steps:,}",
            _amount(one.tokens),
            _amount(one.exaflops),
            _amount(one.hours),
            _amount(one.device_hours),
            _amount(one.tokens_per_s),
            ABSENT if math.isnan(one.mfu) else f"{100 * one.mfu:.1f} %",
        ]
        for one in found.summaries
    ]
    stable = ["", "went back", "spikes", "skipped steps", "gradient norm, median", "largest", "expert load CV"]
    stable.append("dead experts")
    stability = [
        [
            one.name,
            f"{one.rewinds}",
            f"{len(one.spikes)} (step {', '.join(map(str, one.spikes[:3]))}{', ...' * (len(one.spikes) > 3)})"
            if one.spikes
            else "0",
            ABSENT if math.isnan(one.skipped) else f"{one.skipped:.0f}",
            _amount(one.grad_norm_median),
            _amount(one.grad_norm_largest),
            ABSENT if math.isnan(one.load_cv) else f"{one.load_cv:.3f}",
            _amount(one.dead_experts),
        ]
        for one in found.summaries
    ]
    return Part("Speed, cost, stability", tables=[(headers, cost), (stable, stability)])


def _events(runs: list[ComparedRun]) -> list[Part]:
    rows = [
        [run.name, f"{event.step}", charts.SHOWN_EVENTS[event.kind], shortened(event.text, 120)]
        for run in runs
        for event in run.events
        if event.kind in charts.SHOWN_EVENTS
    ]
    if not rows:
        return []
    more = [f"{len(rows) - _MOST_EVENTS} more are not listed."] if len(rows) > _MOST_EVENTS else []
    return [Part("Events", more, tables=[(["", "step", "event", ""], rows[:_MOST_EVENTS])])]


def _data(runs: list[ComparedRun]) -> str:
    """Return what the runs read, if it is the same."""
    datasets = {(run.dataset.get("name", ""), run.dataset.get("digest", "")[:12]) for run in runs}
    if len(datasets) > 1:
        return f"{len(runs)} runs, which read different data"
    name, digest = next(iter(datasets))
    return f"{len(runs)} runs" + (f" on the same data: {name}, digest {digest}" if digest else "")


_FIT = "Loss against compute"


def _fit(found: Comparison) -> Part:
    fit = found.fit
    if fit is None:
        return Part(_FIT, [found.fit_note])
    percent = f"{100 * CONFIDENCE:.0f} %"
    texts = [
        f"L = E + A C^-alpha with E = {fit.floor.value:.4f} nats ({percent}: {fit.floor.low:.4f} to "
        f"{fit.floor.high:.4f}), "
        f"alpha = {fit.exponent.value:.3f} ({fit.exponent.low:.3f} to {fit.exponent.high:.3f}), A = {fit.factor:.4g}, "
        f"C in exaFLOPs; {len(fit.names)} runs deviate from it by {fit.residual_std:.4f} nats (standard deviation).",
        found.fit_note,
    ]
    rows = []
    for place in found.predictions:
        law, run = fit.predict(place), fit.predict_run(place)
        intervals = [f"{one.low:.4f} to {one.high:.4f}" for one in (law, run)]
        rows.append([f"{amount(place)} exaFLOPs", f"{law.value:.4f}", *intervals])
    headers = ["predicted at", "loss", f"{percent} interval of the law", f"{percent} interval of one run"]
    return Part(_FIT, texts, tables=[(headers, rows)] if rows else [])


def _method() -> Part:
    return Part(
        "How this was computed",
        [
            "A training loss at a place is the value there of a straight line, fitted by least squares to the losses "
            f"within {100 * HALF_WIDTH:.0f} % of the place on either side (more where a run has fewer than {FEWEST} "
            "losses there), the same window for all runs. Behind ± in the tables is its standard error, from the "
            "scatter of these losses, widened for the correlation of neighbours. Two runs that read the same batches "
            "are compared batch by batch, so their difference is known better than either loss. Validation losses are "
            "interpolated between two validations. Nothing is extrapolated: a dash stands where a run did not get.",
            "Hours are those of the run's processes, without pauses between them. FLOPs are model FLOPs, as for MFU. "
            "Spikes are those of the steps that were kept, by the defaults of the settings spikes; how often a run "
            "went back from one is counted beside. Expert load is the mean over the last tenth.",
        ],
    )


def _curves(runs: list[ComparedRun]) -> str:
    legend = "Lines: values of straight lines, each fitted to the losses within 10 % of its place. "
    legend += "Crosses: events. A click on a name hides it; the curves below have the same colours."
    if len(runs) <= charts.MOST_WITH_DETAILS:
        legend = f"Faint: each step. Points on dotted lines: validations. {legend}"
    body = paragraphs_html([legend])
    body += figure_html(charts.loss_figure(runs), height=560)
    for metric, words in (
        ("optim/grad_norm", "gradient norm"),
        ("perf/tokens_per_s", "tokens per second"),
        ("moe/load_cv", "expert load, coefficient of variation"),
    ):
        if figure := charts.metric_figure(runs, metric, words):
            body += figure_html(figure, height=360)
    return body


def _fit_json(found: Comparison) -> dict[str, Any]:
    if found.fit is None:
        return {"note": found.fit_note}
    fit = found.fit
    return {
        "note": found.fit_note,
        "runs": fit.names,
        "exaflops": fit.compute.tolist(),
        "losses": fit.loss.tolist(),
        "E": dataclasses.asdict(fit.floor),
        "A": fit.factor,
        "alpha": dataclasses.asdict(fit.exponent),
        "residual_std": fit.residual_std,
        "confidence": CONFIDENCE,
        "predictions": [
            {"exaflops": at, **dataclasses.asdict(fit.predict(at)), "one_run": dataclasses.asdict(fit.predict_run(at))}
            for at in found.predictions
        ],
    }


def _group(found: Comparison, index: int) -> str:
    return next(label for label, group in zip(found.labels, found.groups) if index in group)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _loss(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:.4f}"


def _amount(value: float) -> str:
    return ABSENT if math.isnan(value) else amount(value)


def _text(text: str) -> str:
    return printable(text).replace("<", "&lt;")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_text(cell).replace('|', chr(92) + '|') for cell in cells)} |"
