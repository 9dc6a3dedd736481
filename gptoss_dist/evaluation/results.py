"""What an evaluation leaves behind: a folder with `result.json` and plots, and a run of MLflow below the model's own.

The files come first and are complete before MLflow hears of them; without MLflow they are all there is to it.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.disk import dated_folder, replacing, write_file_atomically
from gptoss_dist.distributed.collectives import broadcast_object
from gptoss_dist.distributed.processes import Ranks
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
    run = _run_of(folder)
    return Subject((run or folder).resolve().name, source, step, run)


def _run_of(folder: Path) -> Path | None:
    """Return the folder of the run that a folder is or lies in, if there is one.

    A short relative path has no parents, and a link has those of the link: so the real path is looked at as well. Where
    both lead to the same run, its folder is called as the user does, under which name the run's records may know it.
    """
    named, real = _holder_of_metrics(folder), _holder_of_metrics(folder.resolve())
    return named if named and (real is None or named.samefile(real)) else real


def _holder_of_metrics(folder: Path) -> Path | None:
    return next((path for path in (folder, *folder.parents[:2]) if (path / "metrics.jsonl").is_file()), None)


@contextmanager
def results_folder(options: ResultOptions, verb: str, subject: Subject, ranks: Ranks | None = None) -> Iterator[Path]:
    """Make the folder for an evaluation's files before its work, and remove it if that fails and has left nothing.

    So another evaluation that begins meanwhile takes another name, and is refused the same `--output`.

    Args:
        options: Where it goes.
        verb: What it is named by, with the time, unless `--output` names it.
        subject: What is evaluated.
        ranks: Given where all ranks call this: rank 0 makes the folder and tells the others; collective.

    Raises:
        ValueError: `--output` names one that exists, or it cannot be written.
    """
    make = partial(_make_folder, options, verb, subject)
    folder = broadcast_object(make) if ranks else make()
    try:
        yield folder
    except BaseException:
        if ranks is None or ranks.is_main:
            with suppress(OSError):  # there is something in it
                folder.rmdir()
        raise


def _make_folder(options: ResultOptions, verb: str, subject: Subject) -> Path:
    parent = (subject.run or Path()) / "evaluations"
    while True:
        folder = Path(options.output) if options.output is not None else dated_folder(parent, verb)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            raise _unwritable(folder) from None
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if options.output is not None:
                raise ValueError(f"--output {folder} exists already; name a new folder, or remove it") from None
            # Another evaluation has made it in this moment: the next name is free.
        except OSError:
            raise _unwritable(folder) from None


def _unwritable(folder: Path) -> ValueError:
    return ValueError(f"results cannot be written to {folder}; name another place with --output")


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
        folder: From `results_folder`.
        figures: What draws each plot, by the name of its file without `.png`.
        mlflow: Whether MLflow is told; what it cannot take now can be sent later
            (`python -m gptoss_dist.tracking sync FOLDER`).
        message: What tells the user what went wrong.
    """
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
