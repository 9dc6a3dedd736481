"""The command `launch/compare.py`: reads runs, compares them, and writes what it found."""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_pipeline.command_line import check_ranges, option, positional, print_line
from data_pipeline.disk import dated_folder, write_file_atomically
from data_pipeline.printable import shortened
from data_pipeline.secrets import without_secrets
from gptoss_dist.tracking.comparing import rendering
from gptoss_dist.tracking.comparing.differences import differences, doubts, labels, replicas
from gptoss_dist.tracking.comparing.equal import EqualTable, equal_table, place_of
from gptoss_dist.tracking.comparing.fits import Fit, final_points, fit_law
from gptoss_dist.tracking.comparing.reading import COMPARISON, KIND_TAG, Server, is_folder, read_folder
from gptoss_dist.tracking.comparing.rendering import Comparison
from gptoss_dist.tracking.comparing.runs import ComparedRun, condensed, with_own_names
from gptoss_dist.tracking.comparing.summary import RunSummary, summarize
from gptoss_dist.tracking.comparing.verdicts import Judgement, judge_training, judge_validation

if TYPE_CHECKING:
    from gptoss_dist.tracking.delivery.environment import Store

Message = Callable[[str], None]

_MOST_VALUES = 2000
"""Of a metric that is only drawn."""
_FEW = 4
"""Below so many runs nobody expects a power law."""
_MOST_COMPARED, _LONGEST_PARAMETER = 50, 500
"""Runs that the tag `compared` of the page's run names, and characters of its parameter `runs`."""


@dataclass
class CompareOptions:
    """Compare runs: what differs, losses at equal cost, and which differences are more than noise."""

    runs: list[str] = positional("RUN", default_factory=list)
    """Folders of runs, or ids of runs in MLflow."""
    experiment: str | None = None
    """All training runs of this experiment in MLflow, beside those that are named."""
    filter: str = option("", may_be_empty=True)
    """Only those of the experiment that fit, in MLflow's words: params.optim.lr = '0.001'."""
    uri: str | None = None
    """Where MLflow is; null is $MLFLOW_TRACKING_URI, then mlflow.db in the working directory."""
    at_tokens: list[str] = option(default_factory=list, metavar="TOKENS", several=True)
    """Compare at these tokens, such as 300k; without one at 1/4, 1/2 and all of what every run reached."""
    at_exaflops: list[str] = option(default_factory=list, metavar="EXAFLOPS", several=True)
    """The same for FLOPs, in units of 1e18."""
    at_hours: list[str] = option(default_factory=list, metavar="HOURS", several=True)
    """The same for hours of training."""
    fit: Literal["auto", "envelope", "final", "none"] = "auto"
    """Fit a power law of loss against compute: to the runs that no cheaper run beats (envelope) or to all (final).
    auto is envelope where that is possible."""
    predict: list[float] = option(default_factory=list, metavar="EXAFLOPS", several=True, above=0)
    """Predict the loss at these budgets from the fit."""
    output: str | None = None
    """Folder for comparison.md, .json and .html, which must not be there yet; null is comparisons/NAME-date."""
    mlflow: bool = True
    """Log the page to MLflow too, as a run of its own in the experiment of the runs."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for text in (*self.at_tokens, *self.at_exaflops, *self.at_hours):
            place_of(text)
        if self.fit == "none" and self.predict:
            raise ValueError("--predict takes its losses from a fit; leave out --fit none")
        if self.filter and not self.experiment:
            raise ValueError("--filter is for the runs of --experiment NAME; give one")
        if not self.runs and not self.experiment:
            raise ValueError("no runs; give two folders of runs or more, or --experiment NAME")

    def places(self, axis: str) -> list[float]:
        """Return where a person wants losses on an axis."""
        return [place_of(text) for text in getattr(self, f"at_{axis}")]


def compare(options: CompareOptions) -> None:
    """Do what `launch/compare.py` is asked to.

    Raises:
        ValueError: There are no two runs to compare, or they cannot be read.
    """
    folder = _output_folder(options)
    found = analyse(*_read(options, _warn), options)
    text = rendering.markdown(found)
    files = {
        "comparison.md": text,
        "comparison.json": json.dumps(rendering.as_json(found), indent=1, allow_nan=False) + "\n",
        "comparison.html": rendering.page(found),
    }
    for name, content in files.items():
        write_file_atomically(folder / name, content.encode("utf-8", "backslashreplace"))
    print_line(text)
    print_line(f"{folder / 'comparison.html'}: the same with curves, for a browser")
    if options.mlflow:
        _log(folder, found, options, list(files), _warn)


def analyse(runs: list[ComparedRun], summaries: list[RunSummary], options: CompareOptions) -> Comparison:
    """Return what can be said about some runs, whose summaries are given."""
    groups = replicas(runs)
    names = labels(runs, groups)
    reasons = doubts(runs)
    tables: list[EqualTable] = []
    notes = []
    for axis, words in (("tokens", "tokens"), ("exaflops", "FLOPs"), ("hours", "hours")):
        table = equal_table(runs, axis, options.places(axis))
        if table is None:
            notes.append(f"Losses at equal {words} are not known: fewer than two runs recorded them.")
        else:
            notes += table.notes([run.name for run in runs], [run.status for run in runs], is_first=not tables)
            tables.append(table)
    spoiled = any(reason.spoils_losses for reason in reasons)
    judgements = [] if spoiled else _judge(runs, summaries, groups, names, tables, notes)
    fit, note = _fit(runs, options, spoiled)
    return Comparison(
        name=_name(options, runs),
        runs=runs,
        labels=names,
        groups=groups,
        differences=differences(runs),
        doubts=reasons,
        tables=tables,
        judgements=judgements,
        summaries=summaries,
        fit=fit,
        fit_note=note,
        predictions=sorted(options.predict),
        notes=notes,
    )


def _judge(
    runs: list[ComparedRun],
    summaries: list[RunSummary],
    groups: list[list[int]],
    names: list[str],
    tables: list[EqualTable],
    notes: list[str],
) -> list[tuple[str, Judgement]]:
    found: list[tuple[str, Judgement]] = []
    if len(groups) < 2:
        notes.append("All runs have the same settings but for the seed: their differences are the noise.")
        return []
    per_token = {round(math.log(one.exaflops / one.tokens), 6) if one.exaflops > 0 else None for one in summaries}
    for table in tables:
        if table.axis == "exaflops" and len(per_token) == 1 and None not in per_token:
            continue  # the same places as those of tokens
        if judgement := judge_training(runs, groups, names, table):
            found.append((table.axis, judgement))
        else:
            notes.append(f"No two configurations got to the last place in {table.words}.")
        if table.axis == "tokens" and (validated := judge_validation(runs, groups, names, table, "loss/val")):
            found.append((table.axis, validated))
    return found


def _fit(runs: list[ComparedRun], options: CompareOptions, spoiled: bool) -> tuple[Fit | None, str]:
    """Return a fit, and what it is, or why there is none; of so few runs that nobody expects one, nothing."""
    if options.fit == "none":
        return None, ""
    is_expected = bool(options.predict) or len(runs) >= _FEW
    if spoiled and options.fit == "auto":
        reason = "no power law is fitted: the losses of the runs are not comparable; --fit final fits one all the same"
        return None, f"{reason}." if is_expected else ""
    only_best = options.fit != "final"
    try:
        fit = fit_law(*final_points(runs, only_best))
    except ValueError as error:
        if options.fit == "auto" and not options.predict:
            return None, f"{error}." if is_expected else ""
        raise
    chosen = "that no run with less compute beats" if only_best else "of the comparison"
    return fit, (
        f"One point is one run {chosen}: its smoothed loss at its end. It is assumed that each run's learning rate had "
        "fallen by its end, that all would be tuned alike, that the deviations are independent and normal, and that "
        "the law holds beyond the runs; of the last nothing here tells."
        + (" Which runs these are was chosen by losses that have noise, so the law is a little low." * only_best)
    )


def _read(options: CompareOptions, message: Message) -> tuple[list[ComparedRun], list[RunSummary]]:
    runs: list[ComparedRun] = []
    summaries: list[RunSummary] = []
    folders: dict[Path, str] = {}
    ids: dict[tuple[str | None, bool], str] = {}
    for run in _sources(options, message):
        # A copied folder has the id of its original: two folders are two runs.
        folder = run.folder.resolve() if run.folder else None
        known = folders.get(folder) if folder else ids.get((run.run_id, True))
        if earlier := known or ids.get((run.run_id, False)):
            message(f"{run.source} is the same run as {earlier}, and is compared once")
            continue
        if folder:
            folders[folder] = run.source
        if run.run_id:
            ids[run.run_id, folder is not None] = run.source
        # At once: of fifty long runs, all that was recorded would take a gigabyte.
        summaries.append(summarize(run))
        runs.append(condensed(run, "loss/", _MOST_VALUES))
    if len(runs) < 2:
        asked = f"--experiment {options.experiment}" if options.experiment else "runs"
        raise ValueError(f"{asked}: {len(runs)} training run is no comparison; give two or more")
    runs = with_own_names(runs)
    return runs, [replace(one, name=run.name) for one, run in zip(summaries, runs)]


def _sources(options: CompareOptions, message: Message) -> Iterator[ComparedRun]:
    server: Server | None = None
    for source in dict.fromkeys(options.runs):
        if is_folder(source):
            yield read_folder(source, message)
        else:
            server = server or Server(options.uri, message)
            yield server.run(source)
    if options.experiment:
        server = server or Server(options.uri, message)
        yield from server.experiment(options.experiment, options.filter)


def _name(options: CompareOptions, runs: list[ComparedRun]) -> str:
    if options.experiment:
        return f"{options.experiment}: {len(runs)} runs"
    names = [run.name for run in runs]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) < 5 else f"{names[0]} and {len(names) - 1} more"


def _output_folder(options: CompareOptions) -> Path:
    if options.output is not None:
        folder = Path(options.output)
        if folder.exists():
            raise ValueError(f"--output {folder} exists already; name a new folder, or remove it")
        return folder
    stem = options.experiment or Path(options.runs[0]).resolve().name
    stem = re.sub(r"[^\w.-]+", "_", stem).strip("._")[:80] or "runs"
    return dated_folder(Path("comparisons"), stem)


def _log(folder: Path, found: Comparison, options: CompareOptions, files: list[str], message: Message) -> None:
    """Log the files as a run of MLflow, where the runs are; if that fails, say so and go on."""
    from gptoss_dist.tracking.delivery.cursor import Cursor
    from gptoss_dist.tracking.delivery.environment import find_store, prepare_environment
    from gptoss_dist.tracking.delivery.requests import one_line

    tracked = next((run for run in found.runs if run.run_id is not None), None)
    if tracked is None and options.uri is None:
        message("the runs are not in MLflow, and so the page is not logged there; --uri names a server")
        return
    store = find_store(options.uri, Cursor(), folder)
    if options.uri is None and tracked is not None and tracked.folder is not None and not options.experiment:
        store = find_store(None, Cursor.load(tracked.folder, message), tracked.folder)
    prepare_environment()
    try:
        _ship(store, [folder / name for name in files], found, options, message)
    except Exception as error:  # MLflow raises its own, and those of its libraries
        message(f"the page is not logged to MLflow at {without_secrets(store.uri)}: {one_line(error)}")


def _ship(store: Store, files: list[Path], found: Comparison, options: CompareOptions, message: Message) -> None:
    """Send the files as a run of MLflow, which is recorded in a temporary folder.

    Raises:
        Exception: Whatever MLflow raises.
    """
    from gptoss_dist.tracking.children import gave_ids
    from gptoss_dist.tracking.delivery.cursor import Cursor
    from gptoss_dist.tracking.delivery.shipper import Shipper
    from gptoss_dist.tracking.tracker import Tracker

    tracked = next((run for run in found.runs if run.run_id is not None), None)
    ids = [run.run_id for run in found.runs if run.run_id is not None]
    experiment_id = tracked.experiment_id if tracked and not options.experiment else None
    if tracked and tracked.folder is not None and not gave_ids(store, Cursor.load(tracked.folder, message)):
        experiment_id = None  # of another server
    more = f" and {len(ids) - _MOST_COMPARED} more" if len(ids) > _MOST_COMPARED else ""
    with tempfile.TemporaryDirectory(prefix="gptoss_dist-compare-") as temporary:
        tracker = Tracker(
            temporary,
            run_name=f"comparison of {found.name}"[:250],
            experiment=options.experiment or (tracked.experiment if tracked else None),
            experiment_id=experiment_id,
            enabled=False,
            params={"runs": shortened(", ".join(run.name for run in found.runs), _LONGEST_PARAMETER)},
            tags={"compared": ", ".join(ids[:_MOST_COMPARED]) + more},
            is_child=True,
            message=message,
        )
        tracker.tag(KIND_TAG, COMPARISON)  # after what MLFLOW_TAGS asks for
        for path in files:
            tracker.artifact(path)
        tracker.close()
        Shipper(Path(temporary), store, Cursor(), threading.Event(), message=message).ship()


def _warn(text: str) -> None:
    print_line(f"compare.py: {text}", file=sys.stderr)
