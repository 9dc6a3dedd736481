"""The note of a run: a page of Markdown that says what it is and how it stands, kept current while it trains."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptoss_dist.planner.flops import MFU_CONVENTION
from gptoss_dist.tracking.about.facts import RunFacts, data_text
from gptoss_dist.tracking.about.formats import amount, in_hours, moment
from gptoss_dist.tracking.records import Event

MOST_EVENTS = 20
MOST_CHARACTERS = 4000
"""MLflow takes tags of 5,000; the rest is for what people add."""
_MOST_SETTINGS, _MOST_VALUE, _MOST_TEXT, _MOST_STEPS = 15, 60, 240, 5
_MOST_SOURCES, _MOST_DATA = 6, 400
_COMMAND_WIDTH = 88
LAST_ONLY = "checkpoint"
"""A kind of event of which only the last is told: they come often."""


@dataclass(frozen=True)
class Standing:
    """How far a run is."""

    state: str
    """`running`, `finished`, `stopped` or `failed`."""
    time: float
    """Seconds since 1970."""
    step: int
    tokens: int
    exaflops: float
    hours: float
    gpu_hours: float
    train_loss: float | None = None
    """Mean of the last steps' losses in nats."""
    averaged_steps: int = 0
    """How many these are."""
    best: tuple[float, int] | None = None
    """The lowest validation loss in nats, and its step."""
    last: tuple[float, int] | None = None
    """The last validation loss, and its step."""
    tokens_per_s: float | None = None
    mfu: float | None = None
    skipped_steps: int = 0


def render(
    facts: RunFacts, standing: Standing, events: Sequence[Event], counts: Mapping[str, int] | None = None
) -> str:
    """Return the note, of at most 4,000 characters: what is older of the events is left out first.

    Args:
        facts: What the run is.
        standing: How far it is.
        events: What happened, in order; old ones may be missing.
        counts: How many events of each kind there were; by default those of `events`.
    """
    kept = [event for event in events if event.kind != LAST_ONLY]
    checkpoints = [event for event in events if event.kind == LAST_ONLY]
    counts = counts or Counter(event.kind for event in events)
    total = sum(count for kind, count in counts.items() if kind != LAST_ONLY)
    shown = min(len(kept), MOST_EVENTS)
    settings = min(len(facts.changed), _MOST_SETTINGS)
    while True:
        text = "\n".join(
            [
                *_headline(facts, standing, kept, counts),
                "",
                *_table(facts, standing, checkpoints),
                "",
                *_events(kept, shown, total),
                *_settings(facts, settings),
                *_commands(facts),
            ]
        )
        if len(text) <= MOST_CHARACTERS or not (shown or settings):
            return text[:MOST_CHARACTERS]
        shown, settings = (shown - 1, settings) if shown > 3 or not settings else (shown, settings - 1)


def _headline(facts: RunFacts, now: Standing, events: Sequence[Event], counts: Mapping[str, int]) -> list[str]:
    """Return what MLflow shows of a note before one asks for more: five lines."""
    count = facts.parameters
    sizes = f"{amount(count.total)} parameters, {amount(count.active)} active"
    share = f" ({100 * now.step / facts.steps:.0f} %)" if facts.steps else ""
    return [
        f"**{facts.name}**: {facts.model}; {sizes}; {data_text(facts.data, _MOST_SOURCES)[:_MOST_DATA]}",
        "",
        f"- **{now.state}**, step {now.step:,} of {facts.steps:,}{share}, as of {moment(now.time)}",
        f"- {_losses(now)}",
        f"- {now.tokens:,} tokens, {now.exaflops:.4g} exaFLOPs, {in_hours(now.gpu_hours)} device-hours{_speed(now)}",
        *_happened(events, counts, now.skipped_steps),
    ]


def _losses(now: Standing) -> str:
    training = "" if now.train_loss is None else f"; training {now.train_loss:.4f} (mean of {now.averaged_steps} steps)"
    if now.best is None or now.last is None:
        return f"validation loss: none yet{training}"
    best = f"best **{now.best[0]:.4f}** at step {now.best[1]:,}"
    last = "" if now.last == now.best else f", last {now.last[0]:.4f} at step {now.last[1]:,}"
    return f"validation loss {best}{last}{training}"


def _speed(now: Standing) -> str:
    if now.tokens_per_s is None:
        return ""
    mfu = "" if now.mfu is None else f", MFU {100 * now.mfu:.1f} %"
    return f"; of late {now.tokens_per_s:,.0f} tokens/s{mfu}"


def _happened(events: Sequence[Event], counts: Mapping[str, int], skipped_steps: int) -> list[str]:
    """Return a line about what a person looks for in a curve that bends; none if nothing happened."""
    named = {"resume": "resumed after step", "rewind": "went back at step", "data": "data changed at step"}
    told = []
    for kind, words in named.items():
        if steps := [f"{event.step:,}" for event in events if event.kind == kind]:
            told.append(f"{words} {_some(steps, counts[kind])}")
    steps = [f"{event.step:,}" for event in events if event.kind == "skipped"]
    # Those of a branch that was given up happened too, and those of an earlier version are no events.
    if skipped := max(skipped_steps, counts.get("skipped", 0)):
        told.append(f"{skipped} skipped" + (f": step {_some(steps, skipped)}" if steps else ""))
    return [f"- {'; '.join(told)}"] if told else []


def _some(steps: list[str], total: int) -> str:
    named = steps[-_MOST_STEPS:]
    return ", ".join(named) + (f" and {total - len(named)} more" if total > len(named) else "")


def _table(facts: RunFacts, now: Standing, checkpoints: list[Event]) -> list[str]:
    rows = [
        ("layout", f"{facts.layout}, {facts.precision}"),
        ("devices", facts.devices),
        ("tokens a step", f"{facts.tokens_per_step:,}"),
        ("hours", f"{in_hours(now.hours)}, of {in_hours(now.gpu_hours)} device-hours"),
        ("MFU counts", MFU_CONVENTION),
        ("checkpoint", _cell(checkpoints[-1].text) if checkpoints else "none yet"),
        ("folder", f"`{facts.folder}`"),
        ("code", f"`{facts.revision}`"),
    ]
    if facts.sweep:
        rows.insert(0, ("sweep", facts.sweep))
    return ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]


def _events(events: list[Event], shown: int, total: int) -> list[str]:
    if not events:
        return []
    older = len(events) - shown
    title = "**Events**" + (f" (the last {shown} of {total})" if total > shown else "")
    lines = [f"- step {event.step:,}, {moment(event.time)}: **{event.kind}** {_cell(event.text)}" for event in events]
    return [title, "", *lines[older:], ""]


def _settings(facts: RunFacts, shown: int) -> list[str]:
    if not shown:
        return []
    items = [f"`{key}={_cell(value)[:_MOST_VALUE]}`" for key, value in facts.changed.items()]
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return [f"**Not the defaults**: {', '.join(items[:shown])}{more}", ""]


def _commands(facts: RunFacts) -> list[str]:
    return [
        "**Go on with it, or repeat it** at the same commit",
        "",
        "```",
        _in_short_lines(facts.resume_command),
        _in_short_lines(facts.repeat_command),
        "```",
    ]


def _in_short_lines(command: str) -> str:
    """Return a command in lines of the shell that end before an option: a long one would widen MLflow's whole page."""
    options: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        if not options or word.lstrip("'").startswith("--"):
            options.append(word)
        else:
            options[-1] += f" {word}"
    lines = options[:1]
    for option in options[1:]:
        if len(lines[-1]) + len(option) > _COMMAND_WIDTH:
            lines.append(f"    {option}")
        else:
            lines[-1] += f" {option}"
    return " \\\n".join(lines)


def _cell(text: str) -> str:
    """Return a text that stays in its line and in its cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")[:_MOST_TEXT]
