"""What an evaluation leaves behind: a folder with `result.json` and plots, and a run of MLflow below the model's own.

The files come first and are complete before MLflow hears of them; without MLflow they are all there is to it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.disk import dated_folder, replacing, write_file_atomically
from gptoss_dist.evaluation.options import ResultOptions
from gptoss_dist.tracking.children import open_child

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "result.json"
_MOST_LETTERS = 200
"""Of a part of a metric's name, of which MLflow takes 250 characters in all."""


@dataclass(frozen=True)
class Subject:
    """What was evaluated."""

    name: str
    """Of the run, the exported model or the architecture."""
    source: str
    """What the user called it."""
    step: int = 0
    """The checkpoint's step; 0 where there is none."""
    run: Path | None = None
    """The folder of the training run, if it belongs to one."""


@dataclass(frozen=True)
class Result:
    """Numbers of one evaluation."""

    verb: str
    """Which one, such as `passkey`."""
    settings: dict[str, Any]
    """What it was asked to do, so that it can be repeated."""
    rows: list[dict[str, Any]]
    """The table, a dictionary per line."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What MLflow shows, such as `eval/passkey/accuracy`."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else is worth keeping."""


def subject_of(source: str, checkpoint: Path | None = None, step: int = 0) -> Subject:
    """Return what `source` names: a run's folder, one of its checkpoints, or a model of its own.

    Args:
        source: What the user gave.
        checkpoint: The checkpoint that was read, if it is one.
        step: Its step.
    """
    folder = Path(checkpoint or source.rpartition(":")[2])
    run = next((path for path in (folder, *folder.parents[:2]) if (path / "metrics.jsonl").is_file()), None)
    return Subject((run or folder).resolve().name, source, step, run)


def results_folder(options: ResultOptions, verb: str, subject: Subject) -> Path:
    """Return the folder for an evaluation's files, which does not exist yet.

    Raises:
        ValueError: `--output` names one that does, or it cannot be written.
    """
    if options.output is not None:
        folder = Path(options.output)
        if folder.exists():
            raise ValueError(f"--output {folder} exists already; name a new folder, or remove it")
    else:
        folder = dated_folder((subject.run or Path()) / "evaluations", verb)
    try:  # now, and not after hours of work
        folder.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"results cannot be written to {folder}; name another place with --output")
    return folder


def metric_parts(names: Iterable[str]) -> dict[str, str]:
    """Return names as parts of a metric's name that MLflow takes as they are, different ones of different names.

    Args:
        names: Such as `data/one`, `../two` or `texts/*.txt`.
    """
    found: dict[str, str] = {}
    for name in names:
        parts = (re.sub(r"[^\w\-. :]", "_", part) for part in name.split("/"))
        part = "/".join(part for part in parts if part not in ("", ".", ".."))[:_MOST_LETTERS].rstrip("/") or "_"
        number = 1
        while (unique := part if number == 1 else f"{part}-{number}") in found.values():
            number += 1
        found[name] = unique
    return found


def publish(
    result: Result,
    subject: Subject,
    folder: Path,
    *,
    figures: Mapping[str, Callable[[Figure], None]] | None = None,
    mlflow: bool = True,
    message: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> None:
    """Write the files of an evaluation, and tell MLflow.

    Args:
        result: The numbers.
        subject: What they are of.
        folder: From `results_folder`; it is created.
        figures: What draws each plot, by the name of its file without `.png`.
        mlflow: Whether MLflow is told; what it cannot take now can be sent later
            (`python -m gptoss_dist.tracking sync FOLDER`).
        message: What tells the user what went wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        _finite(
            {
                "evaluation": result.verb,
                "subject": {"name": subject.name, "source": subject.source, "step": subject.step},
                "settings": result.settings,
                "metrics": result.metrics,
                "rows": result.rows,
                **result.details,
            }
        ),
        indent=1,
        allow_nan=False,
    )
    write_file_atomically(folder / RESULT, (text + "\n").encode())
    drawn = []
    for name, draw in (figures or {}).items():
        try:
            drawn.append(_draw(folder / f"{name}.png", draw))
        except Exception as error:  # the numbers are there
            message(f"{name}.png could not be drawn: {type(error).__name__}: {error}")
    if not mlflow:
        return
    tracker = open_child(
        folder,
        subject.run,
        run_name=f"{result.verb} of {subject.name}",
        params=result.settings | {"evaluated": subject.source},
        tags={"evaluation": result.verb, "step": subject.step},
        message=message,
    )
    tracker.log(subject.step, result.metrics)
    for path in (folder / RESULT, *drawn):
        tracker.artifact(path)
    tracker.close()


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys under their names, numbers to the right."""
    if not rows:
        return
    cells = [[str(name) for name in rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    numeric = [isinstance(value, (int, float)) for value in rows[0].values()]
    for line in cells:
        print("  ".join(f"{c:>{w}}" if n else f"{c:<{w}}" for c, w, n in zip(line, widths, numeric)).rstrip())


def _finite(value: Any) -> Any:
    """Return a value for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _draw(path: Path, draw: Callable[[Figure], None]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    draw(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path
