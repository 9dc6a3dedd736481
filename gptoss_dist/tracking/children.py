"""Runs of MLflow below the one of a training run, such as an evaluation of what it has learnt."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from gptoss_dist.tracking.delivery.cursor import Cursor
from gptoss_dist.tracking.delivery.environment import find_store
from gptoss_dist.tracking.records import RunStart, run_starts
from gptoss_dist.tracking.tracker import Tracker

logger = logging.getLogger(__name__)


def open_child(
    folder: Path,
    parent: Path | None,
    *,
    run_name: str,
    params: dict | None = None,
    tags: dict | None = None,
    message: Callable[[str], None] = logger.warning,
) -> Tracker:
    """Begin the record of a run that MLflow shows below another one, in the same experiment on the same server.

    Args:
        folder: Where its files go.
        parent: Folder of the training run; None, or one that MLflow does not know, makes it a run of its own.
        run_name: Its name.
        params: As those of `Tracker`.
        tags: As those of `Tracker`.
        message: What tells the user what goes wrong.
    """
    uri = experiment = experiment_id = None
    tags = dict(tags or {})
    if parent is not None and (start := _start(parent)) is not None:
        cursor = Cursor.load(parent, message)
        uri, experiment = find_store(None, cursor, parent).uri, start.experiment
        experiment_id = start.experiment_id
        tags["parent_run"] = start.run_name
        if cursor.run_id is not None:
            tags["mlflow.parentRunId"] = cursor.run_id
    return Tracker(
        folder,
        run_name=run_name,
        experiment=experiment,
        experiment_id=experiment_id,
        uri=uri,
        params=params,
        tags=tags,
        is_child=True,
        message=message,
    )


def _start(run_dir: Path) -> RunStart | None:
    """Return how a run began last, if it was recorded."""
    with contextlib.suppress(OSError, IndexError):
        return run_starts(run_dir)[-1]
    return None
