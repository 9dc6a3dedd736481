"""Runs of MLflow below the one of a training run, such as an evaluation of what it has learnt."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from data_pipeline.secrets import without_secrets
from gptoss_dist.tracking.delivery.cursor import Cursor
from gptoss_dist.tracking.delivery.database import Database
from gptoss_dist.tracking.delivery.environment import Store, find_store, sqlite_path
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

    On another server, to which `MLFLOW_TRACKING_URI` or the place of a copied folder may lead, it is a run of its own
    in the experiment of the same name: ids mean something else there.

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
        store = find_store(None, cursor, parent)
        uri, experiment = store.uri, start.experiment
        tags["parent_run"] = start.run_name
        if gave_ids(store, cursor):
            experiment_id = start.experiment_id
            if cursor.run_id is not None:
                tags["mlflow.parentRunId"] = cursor.run_id
        elif cursor.run_id is not None:
            message(f"MLflow shows {run_name} by itself: {start.run_name} was sent to {cursor.uri}, not to {store.uri}")
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


def gave_ids(store: Store, cursor: Cursor) -> bool:
    """Return whether the ids in a run's records are those of a store.

    They are if it is the one that the run was sent to, or a copy of its database, which then has the run as well. A
    run's folder that was copied alone may lie where its cursor finds a database of other runs.
    """
    if cursor.uri is None:
        return False
    if store.database is None:
        return without_secrets(store.uri).rstrip("/") == cursor.uri.rstrip("/")
    recorded = sqlite_path(cursor.uri)
    if recorded is not None and recorded.resolve() == store.database.resolve():
        return True
    return cursor.run_id is not None and Database(store.database).has_run(cursor.run_id)


def _start(run_dir: Path) -> RunStart | None:
    """Return how a run began last, if it was recorded."""
    with contextlib.suppress(OSError, IndexError):
        return run_starts(run_dir)[-1]
    return None
