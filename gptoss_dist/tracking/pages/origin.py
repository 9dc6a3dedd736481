"""Where a run was made, and how to make it again."""

from __future__ import annotations

import shlex
from pathlib import Path

from data_pipeline.command_line.texts import dump_yaml
from data_pipeline.foreign import read_text
from data_pipeline.printable import shortened
from data_pipeline.secrets import without_secrets
from gptoss_dist.tracking.about.formats import moment
from gptoss_dist.tracking.about.settings import UNKNOWN, changed_settings, launch_command, repeated
from gptoss_dist.tracking.pages.skeleton import escaped, table_html
from gptoss_dist.tracking.recorded.run import RecordedRun

_ENVIRONMENT = ("host", "hardware", "world_size", "torch", "layout", "engine", "precision", "routing", "mfu.peak")
"""Tags that say where a run was made, in this order; what else the run was tagged with comes after them."""
_ELSEWHERE = ("spike.", "data.change.", "mlflow.", "best_", "last_", "state", "resume.")
"""Beginnings of tags that are shown in other sections, or are MLflow's own."""


def environment_html(run: RecordedRun) -> str:
    """Return the hardware, the versions and the code of a run, and when its processes started."""
    tags = run.tags
    names = [name for name in _ENVIRONMENT if name in tags]
    names += sorted(name for name in tags if name not in _ENVIRONMENT and not name.startswith(_ELSEWHERE))
    rows = [(name, tags[name]) for name in names]
    rows += [
        (f"git {name.removeprefix('mlflow.source.git.')}", tags[name])
        for name in sorted(tags)
        if name.startswith("mlflow.source.git.")
    ]
    starts = [
        (
            moment(start.time),
            "anew" if start.resumed_step is None else f"from step {start.resumed_step:,}",
            start.tags.get("host", "–"),
            start.tags.get("world_size", "–"),
            start.tags.get("git.sha", "–"),
        )
        for start in run.starts[-20:]
    ]
    parts = [
        f'<div class="facts">{table_html(("", ""), rows)}</div>'
        if rows
        else "<p>Nothing is recorded of the environment.</p>"
    ]
    if starts:
        parts.append("<h3>Starts</h3>" + table_html(("time", "start", "host", "processes", "code"), starts))
    return "\n".join(parts)


def reproduction_html(run: RecordedRun) -> str:
    """Return the commands that make the run again, what its settings change of the defaults, and all settings."""
    parts = [f"<pre>{escaped(commands(run))}</pre>"]
    if digest := run.dataset.get("digest"):
        about = "The data of this run have this digest; others give other losses:"
        parts.append(f"<p>{about} <code>{escaped(digest)}</code></p>")
    changed = [
        (key, _shown(value), "(unknown here)" if default is UNKNOWN else _shown(default))
        for key, (value, default) in changed_settings(run.config, with_model=True).items()
    ]
    parts.append("<h3>Settings that are not the defaults</h3>")
    parts.append(_settings_html(changed) if changed else "<p>None is known.</p>")
    parts.append(_all_settings(run))
    return "\n".join(parts)


def commands(run: RecordedRun) -> str:
    """Return the lines of a shell that make a run again under another name, from a clone of the code."""
    lines = []
    revision = run.tags.get("git.sha", "")
    commit = run.tags.get("mlflow.source.git.commit") or revision.removesuffix("-dirty")
    if commit and commit != "unknown":
        lines.append(f"git checkout {shlex.quote(commit)}")
    if revision.endswith("-dirty"):
        lines.append("# the code had changes that are not in this commit")
    lines.append("sh launch/install.sh")
    folder = run.folder if run.folder is not None else Path("runs") / run.name
    processes, machines = (_count(run, tag) for tag in ("world_size", "machines"))
    if processes is None:
        lines.append("# the number of its processes is not recorded")
    elif machines != 1 and processes > 1:
        on = f" on {machines} machines" if machines else ""
        lines.append(f"# {processes} processes{on}; on several machines see docs/multi_node.md")
    lines.append(repeated(launch_command(folder / "config.yaml", processes or 1, machines), run.name))
    if len(run.starts) > 1:
        lines.append("# its own settings are those of its last start; what resumes changed is in log.txt")
    return "\n".join(lines)


def _count(run: RecordedRun, tag: str) -> int | None:
    """Return the number in a tag, None if it is not there or no number above 0: its text goes into a shell."""
    text = run.tags.get(tag, "")
    return int(text) or None if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _shown(value: object) -> str:
    return shortened(value, _MOST_CHARACTERS)


def _settings_html(changed: list[tuple[str, str, str]]) -> str:
    return f'<div class="facts">{table_html(("setting", "value", "default"), changed)}</div>'


_MOST_CHARACTERS = 120
"""Of a value in the table of settings; all of it stands in config.yaml below."""


def _all_settings(run: RecordedRun) -> str:
    """Return config.yaml as it is; without it what the journal says of the settings."""
    text = ""
    if run.folder is not None:
        try:
            text = without_secrets(read_text(run.folder / "config.yaml"))
        except ValueError:  # told when the run was read
            text = ""
    if not text and run.config:
        text = dump_yaml(run.config, allow_unicode=False)
    return f"<details><summary>All settings (config.yaml)</summary><pre>{escaped(text)}</pre></details>" if text else ""
