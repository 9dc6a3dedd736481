"""The report of a run: one page of HTML that can be forwarded, opened without a network, and printed.

It is made of what the run's folder holds, also while the run is under way, after it was killed, or where it was made by
an earlier version; what is not recorded is left out. The page is replaced at once when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.command_line import positional, print_line
from data_pipeline.disk import replacing
from data_pipeline.printable import first_line, printable
from data_pipeline.secrets import without_secrets
from gptoss_dist.tracking.about.formats import moment
from gptoss_dist.tracking.jsonl import read_lines
from gptoss_dist.tracking.live.snapshot import RunWatch, check_run
from gptoss_dist.tracking.pages.curves import curves_html
from gptoss_dist.tracking.pages.data_read import data_html
from gptoss_dist.tracking.pages.origin import environment_html, reproduction_html
from gptoss_dist.tracking.pages.overview import events_html, summary_html
from gptoss_dist.tracking.pages.results import evaluations_html, samples_html
from gptoss_dist.tracking.pages.routing import routing_html
from gptoss_dist.tracking.pages.skeleton import Section, html_page
from gptoss_dist.tracking.pages.step_time import step_time_html
from gptoss_dist.tracking.recorded.run import RecordedRun, read_run
from gptoss_dist.tracking.records import METRICS_FILE

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"


@dataclass
class ReportOptions:
    """Write the report of a run: one page of HTML with its curves, samples, events and settings."""

    run: str = positional("RUN")
    """Folder of a run, such as runs/quickstart; it may be under way."""
    output: str | None = None
    """The file; null is report.html in the run's folder."""


def report(options: ReportOptions) -> None:
    """Write the report that the command line asks for, and print where it is.

    Raises:
        ValueError: There is no such run, it has no metrics yet, or the file cannot be written.
    """
    path = write_report(options.run, options.output, message=lambda text: print_line(f"report.py: {text}"))
    print_line(str(path))


def write_report(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    state: str | None = None,
    message: Callable[[str], None] = logger.warning,
) -> Path:
    """Write the report of a run.

    Args:
        run_dir: Folder of the run.
        output: The file; by default `report.html` in that folder.
        state: How the run is, in words; by default what its folder tells.
        message: What is told what cannot be read.

    Returns:
        The file.

    Raises:
        ValueError: The folder holds no run with metrics, or the file cannot be written.
    """
    run_dir = Path(run_dir)
    check_run(run_dir)
    path = Path(output) if output is not None else run_dir / REPORT_FILE
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file with --output")
    run = read_run(run_dir, message)
    if not len(run.columns.steps):
        raise ValueError(f"{run_dir} has no metrics to report yet")
    page = page_of(run, state or RunWatch(run_dir).look().state.text, message)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); name another file with --output") from None
    return path


def write_in_time(run_dir: Path, state: str, message: Callable[[str], None], timeout_s: float = 60.0) -> Path | None:
    """Write the report at the end of a run, in a thread that is waited for so long; nothing that goes wrong is raised.

    Args:
        run_dir: Folder of the run.
        state: How the run ended, in words.
        message: What tells the user that there is no report, and why.
        timeout_s: Seconds.

    Returns:
        The file; None if there is none in time.
    """
    if not has_steps(run_dir):  # it failed before there was anything to report
        return None
    written: list[Path] = []

    def write() -> None:
        try:
            written.append(write_report(run_dir, state=state, message=logger.info))
        except Exception as error:  # a report must never end a run
            message(f"no report was written: {first_line(error)}")

    thread = threading.Thread(target=write, name="run-report", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        message(f"the report takes longer than {timeout_s:.0f} s; write it with launch/report.py {run_dir}")
    return written[0] if written else None


def has_steps(run_dir: Path) -> bool:
    """Return whether anything is recorded in a run's folder."""
    with contextlib.suppress(OSError):
        return any("metrics" in line for line, _ in itertools.islice(read_lines(run_dir / METRICS_FILE), 10))
    return False


def page_of(run: RecordedRun, state: str, message: Callable[[str], None]) -> str:
    """Return the page of a run.

    Args:
        run: The run.
        state: How it is, in words.
        message: What is told what cannot be read.
    """
    run = _public(run)
    sections = (
        Section("Summary", f"<style>{_STYLE}</style>{summary_html(run, state)}"),
        Section("Curves", curves_html(run)),
        Section("Samples", samples_html(run, message)),
        Section("Experts", routing_html(run, message)),
        Section("Data", data_html(run)),
        Section("Time", step_time_html(run)),
        Section("Events", events_html(run)),
        Section("Evaluations", evaluations_html(run, message)),
        Section("Environment", environment_html(run)),
        Section("How to make it again", reproduction_html(run)),
    )
    steps = run.columns.steps
    read = f"metrics up to step {int(steps[-1]):,} of {moment(float(run.columns.times[-1]))}"
    return html_page(f"Run {printable(run.name)}", sections, subtitle=f"{state}; {read}")


def _public(run: RecordedRun) -> RecordedRun:
    """Return the run without the secrets that URLs in its settings, tags and events may hold."""
    return dataclasses.replace(
        run,
        config=_without_secrets(run.config),
        tags=_without_secrets(run.tags),
        dataset=_without_secrets(run.dataset),
        starts=[dataclasses.replace(start, tags=_without_secrets(start.tags)) for start in run.starts],
        events=[dataclasses.replace(event, text=without_secrets(event.text)) for event in run.events],
    )


def _without_secrets(value: Any) -> Any:
    """Return a tree of settings in which no text holds a secret."""
    if isinstance(value, dict):
        return {key: _without_secrets(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_secrets(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value


# A sheet of paper is as wide as the screen for which the figures were drawn; whoever prints it scales it down.
_STYLE = """
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .7rem; margin: .6rem 0; }
.card { padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 6px; }
.card .value { font-size: 1.35rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card .name { color: var(--soft); font-size: .82rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: .4rem 1.2rem; }
.modebar { opacity: 0; }
.figure:hover .modebar { opacity: 1; }
.switch { max-width: none; text-align: right; color: var(--soft); }
select { font: inherit; color: inherit; background: var(--row); border: 1px solid var(--line); border-radius: 4px; }
.facts td.number { text-align: left; }
.facts td:first-child { white-space: nowrap; }
.samples td { min-width: 18rem; }
.samples td.number { min-width: 4rem; }
.samples pre { margin: 0; padding: .3rem .5rem; font-size: .8rem; border: 0; background: none; }
summary { cursor: pointer; color: var(--soft); }
@page { size: 1280px 1810px; margin: 36px; }
@media print {
  nav, .switch, .modebar { display: none; }
  body { max-width: none; padding: 0; font-size: 12px; }
  h2 { break-after: avoid; }
  .figure, .card, tr { break-inside: avoid; }
}
"""
