"""A snapshot of a run as a screen of a terminal, or as plain lines.

Texts of the run (samples, messages, names) come from elsewhere: they are shown without markup, and what a terminal
would obey as escapes.
"""

from __future__ import annotations

import math
import re

from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data_pipeline.printable import printable, shortened
from gptoss_dist.tracking.about.formats import clock, duration
from gptoss_dist.tracking.live import curve
from gptoss_dist.tracking.live.snapshot import Snapshot

_STYLES = {
    "waiting": "yellow",
    "starting": "cyan",
    "running": "green",
    "stalled": "bold red",
    "finished": "green",
    "stopped": "yellow",
    "failed": "bold red",
    "died": "bold red",
}
_SIDE = 38
"""Characters of the column of numbers."""
_LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d (\d\d:\d\d:\d\d),\d+ (\w+) [\w.]+: (.*)")
_FRAME = 2
"""Lines of the frame of a panel."""
_LEAST_CHART = 4
_SMOOTHED = 50
"""Steps whose mean is shown as the loss."""


def screen(snapshot: Snapshot, console: Console) -> RenderableType:
    """Return what fills the terminal of `console`, and no more than that, if it has some ten lines."""
    width, height = console.size
    left = height - 3 - _FRAME  # the first two lines, the last one, and the frame of the chart
    panels: list[RenderableType] = []  # messages are the last on the screen, and the first to get room
    for make, share in ((_messages_panel, 5), (_ranks_panel, 4), (_sample_panel, 6)):
        panel, lines = make(snapshot, console, max(2, min(8, left // share)))
        if panel is not None and left - lines >= _LEAST_CHART:
            panels.append(panel)
            left -= lines
    numbers = _numbers(snapshot)
    chart = max(_LEAST_CHART, min(left, 20, max(len(numbers), 8)))
    top = _chart_panel(snapshot, console, width - (_SIDE if width >= 2 * _SIDE else 0), chart)
    if width >= 2 * _SIDE:
        row = Table.grid(expand=True)
        row.add_column(ratio=1)
        row.add_column(width=_SIDE)
        row.add_row(top, _numbers_panel(numbers[:chart], console, chart))
        top = row
    return Group(_headline(snapshot), _progress(snapshot, width), top, *reversed(panels))


def plain(snapshot: Snapshot) -> str:
    """Return the same in lines for a file or a pipe."""
    lines = [f"{printable(snapshot.name)}: {printable(snapshot.state.text)}", f"  {_steps_in_words(snapshot)}"]
    lines += [f"  {name:<16}{printable(value)}" for name, value in _numbers(snapshot)]
    if snapshot.ranks and len(snapshot.ranks.ranks) > 1:
        lines.append("  ranks")
        lines += [f"    {'  '.join(cells)}" for cells in _rank_rows(snapshot, 8)]
    if snapshot.sample:
        step, text = snapshot.sample
        lines += [f"  sample of step {step}", *(f"    {line}" for line in printable(text, lines=True).split("\n")[:8])]
    if snapshot.messages:
        lines += ["  messages", *(f"    {_log_line(line)}" for line in snapshot.messages)]
    return "\n".join(lines)


def _framed(content: RenderableType, title: str, console: Console, height: int | None = None) -> Panel:
    """Return a panel; `height` is that of its content."""
    lines = box.ROUNDED if _has_unicode(console) else box.ASCII
    return Panel(content, title=title, title_align="left", box=lines, height=height and height + _FRAME)


def _has_unicode(console: Console) -> bool:
    return (console.encoding or "").lower().startswith("utf")


def _chart_panel(snapshot: Snapshot, console: Console, width: int, height: int) -> RenderableType:
    steps, values = snapshot.loss.steps, snapshot.loss.values
    chart = curve.draw(steps, values, width - 4, height, only_ascii=not _has_unicode(console))
    title = f"loss of steps {steps[0]} to {steps[-1]}" if steps else "loss"
    return _framed(Text("\n".join(chart), style="cyan"), title, console, height)


def _numbers_panel(numbers: list[tuple[str, str]], console: Console, height: int) -> RenderableType:
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for name, value in numbers:
        table.add_row(name, Text(printable(value)))
    return _framed(table, "now", console, height)


def _ranks_panel(snapshot: Snapshot, console: Console, most: int) -> tuple[RenderableType | None, int]:
    """Return a panel of at most `most` ranks and the lines that it takes; like those that follow."""
    rows = _rank_rows(snapshot, most)
    if not rows:
        return None, 0
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in rows[0]:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for cells in rows[1:]:
        table.add_row(*(Text(cell, style="bold red" if cells[-1] else "") for cell in cells))
    return _framed(table, "ranks", console), len(rows) + _FRAME


def _sample_panel(snapshot: Snapshot, console: Console, most: int) -> tuple[RenderableType | None, int]:
    if snapshot.sample is None:
        return None, 0
    step, text = snapshot.sample
    width = max(1, console.width - 4)
    lines = [
        line[start : start + width]
        for line in printable(text, lines=True).expandtabs(4).split("\n")
        for start in range(0, max(1, len(line)), width)
    ][:most]
    shown = Text("\n".join(lines), no_wrap=True, overflow="crop")
    return _framed(shown, f"sample of step {step}", console), len(lines) + _FRAME


def _messages_panel(snapshot: Snapshot, console: Console, most: int) -> tuple[RenderableType | None, int]:
    lines = [_log_line(line) for line in snapshot.messages[-most:]]
    if not lines:
        return None, 0
    shown = Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
    return _framed(shown, "messages", console), len(lines) + _FRAME


def _headline(snapshot: Snapshot) -> Text:
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(printable(snapshot.name), style="bold")
    text.append("  ")
    text.append(printable(snapshot.state.text), style=_STYLES[snapshot.state.kind])
    return text


def _progress(snapshot: Snapshot, width: int) -> RenderableType:
    words = _steps_in_words(snapshot)
    text, room = Text(words, no_wrap=True, overflow="ellipsis"), min(60, width - len(words) - 2)
    if not snapshot.last_step or room < 10:
        return text
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(snapshot.last_step, snapshot.step, width=room), text)
    return row


def _steps_in_words(snapshot: Snapshot) -> str:
    words = f"step {snapshot.step}"
    if snapshot.last_step:
        words += f"/{snapshot.last_step} ({100 * snapshot.step / snapshot.last_step:.0f} %)"
    if snapshot.remaining_s is not None:
        words += f", {duration(snapshot.remaining_s)} left"
        if snapshot.remaining_s:
            words += f", ends about {clock(snapshot.taken + snapshot.remaining_s)}"
    for did, steps in (("resumed at", snapshot.resumes), ("went back to", snapshot.rewinds)):
        if steps:
            words += f", {did} {', '.join(map(str, steps[-3:]))}"
    return words


def _numbers(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Return names and values of what is known now, the most wanted first."""
    rows: list[tuple[str, str]] = []
    newest = snapshot.newest

    def add(name: str, metric: str, form: str) -> None:
        if (value := newest.get(metric)) is not None and math.isfinite(value):
            rows.append((name, form.format(value)))

    if recent := [value for value in snapshot.loss.values[-_SMOOTHED:] if math.isfinite(value)]:
        rows.append(("loss", f"{sum(recent) / len(recent):.4f} (mean of {len(recent)})"))
    if snapshot.validation.steps:
        best = min(range(len(snapshot.validation.steps)), key=lambda i: _sortable(snapshot.validation.values[i]))
        steps, values = snapshot.validation.steps, snapshot.validation.values
        rows.append(("validation", f"{values[-1]:.4f} (step {steps[-1]})"))
        if best != len(steps) - 1:
            rows.append(("best", f"{values[best]:.4f} (step {steps[best]})"))
    add("learning rate", "optim/lr", "{:.3g}")
    add("gradient norm", "optim/grad_norm", "{:.3g}")
    if skipped := newest.get("optim/skipped_steps"):
        rows.append(("skipped steps", f"{skipped:.0f}"))
    add("tokens/s", "perf/tokens_per_s", "{:,.0f}")
    if (mfu := newest.get("perf/mfu")) is not None:
        rows.append(("MFU", f"{100 * mfu:.1f} % (model FLOPs)"))
    if snapshot.seconds_per_step:
        rows.append(("s per step", f"{snapshot.seconds_per_step:.3g}"))
    add("tokens", "progress/tokens", "{:,.0f}")
    add("exaFLOPs", "progress/exaflops", "{:.4g}")
    memory = "perf/memory_peak_allocated_gib" if "perf/memory_peak_allocated_gib" in newest else "perf/memory_rss_gib"
    add("memory GiB", memory, "{:.2f}")
    add("dead experts", "moe/dead_experts", "{:.0f}")
    if slowest := newest.get("perf/step_ms_max_over_median"):
        rows.append(("slowest rank", f"{newest.get('perf/slowest_rank', -1):.0f}, {slowest:.2f} x median"))
    for name, tag in (("layout", "layout"), ("hardware", "hardware")):
        if tag in snapshot.tags:
            rows.append((name, shortened(snapshot.tags[tag], _SIDE - 16)))
    return rows


def _sortable(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _rank_rows(snapshot: Snapshot, most: int) -> list[list[str]]:
    """Return a heading and a row for each of the ranks that matter most; [] if they are not known."""
    report = snapshot.ranks
    if report is None or not report.ranks:
        return []
    rows = [["rank", "host", "step", "does", "own ms", "x median", ""]]
    for state in report.notable(most):
        lag = report.lag(state)
        remarks = []
        if state.is_silent:
            remarks.append("silent")
        if state.is_behind:
            remarks.append("behind")
        if lag is not None and lag > 1.5:
            remarks.append("slow")
        rows.append(
            [
                str(state.rank),
                printable(state.host),
                str(state.step),
                printable(state.phase),
                f"{state.own_ms:.1f}" if state.measured_step else "-",
                f"{lag:.2f}" if lag is not None else "-",
                ", ".join(remarks),
            ]
        )
    if (hidden := len(report.ranks) - (len(rows) - 1)) > 0:
        rows.append(["...", f"and {hidden} more", "", "", "", "", ""])
    return rows


def _log_line(line: str) -> str:
    """Return a line of log.txt with the time, the level if it is no ordinary one, and the message."""
    if not (found := _LOG_LINE.fullmatch(line)):
        return printable(line)
    level = "" if found[2] == "INFO" else f"{found[2]} "
    return printable(f"{found[1]} {level}{found[3]}")
