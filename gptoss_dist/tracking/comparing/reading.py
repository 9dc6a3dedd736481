"""Runs read for a comparison, from their folders or from MLflow, of which the folder is taken where it is here.

MLflow keeps what a run logged before it went back to an earlier step. Such points are recognised by the time at which
they were logged, and left out:

    step   1  2  3  4  5  3  4  5  6        the first 3, 4 and 5 were logged before the run went back to step 2
    time   0  1  2  3  4  9 10 11 12        and everything of a later step that was logged before time 9 goes with them
"""

from __future__ import annotations

import ast
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.printable import shown
from data_pipeline.secrets import without_secrets
from gptoss_dist.tracking.comparing.equal import TRAIN
from gptoss_dist.tracking.comparing.runs import ComparedRun, RunEvent, Series, number_of, series_of
from gptoss_dist.tracking.comparing.summary import METRICS
from gptoss_dist.tracking.delivery.cursor import Cursor
from gptoss_dist.tracking.delivery.database import Database
from gptoss_dist.tracking.delivery.environment import find_store, prepare_environment
from gptoss_dist.tracking.delivery.requests import one_line
from gptoss_dist.tracking.recorded.columns import filled, is_validation
from gptoss_dist.tracking.recorded.run import read_run, training_flops, with_gaps_filled
from gptoss_dist.tracking.records import METRICS_FILE

logger = logging.getLogger(__name__)

_AXIS_METRICS = ("progress/tokens", "progress/exaflops", "progress/hours", "progress/gpu_hours")
_OF_EACH_STEP = ("progress/tokens", "optim/lr", "optim/grad_norm")
"""Metrics, any of which shows that a step was done."""
_LONGEST_PAUSE_S = 600.0
"""Between two points of a run in MLflow: what is longer is taken for a pause between two processes."""
_EVENTS = ("resume", "rewind", "skipped", "data")
"""Kinds of events whose count is a metric, `events/KIND`."""
_PAGE = 1000

KIND_TAG, COMPARISON = "gptoss_dist.kind", "comparison"
"""What marks the runs of MLflow that hold a comparison."""


def read_folder(folder: str | Path, message: Callable[[str], None] = logger.warning) -> ComparedRun:
    """Read a run's folder.

    Raises:
        ValueError: It has no training loss.
    """
    run = read_run(folder, message)
    columns = run.columns
    if TRAIN not in columns:
        raise ValueError(f"{folder}: {METRICS_FILE} has no {TRAIN}; give the folder of a training run")
    series = {name: Series(*columns.points(name)) for name in columns if _is_read(name)}
    series[TRAIN] = series_of(_with_bad_losses(columns))
    settings = [start.params for start in run.starts]
    changed = {key for old, new in pairwise(settings) for key in new if key in old and new[key] != old[key]}
    return ComparedRun(
        name=run.name,
        source=str(folder),
        config=_texts(run.config),
        tags=run.tags,
        dataset=run.dataset,
        status=run.status,
        steps=columns.steps,
        axes={"tokens": run.tokens, "exaflops": run.exaflops, "hours": run.hours},
        series={name: one for name, one in series.items() if len(one.rows)},
        folder=Path(folder),
        events=[RunEvent(event.step, event.kind, event.text) for event in run.events],
        run_id=run.run_id,
        experiment=run.starts[-1].experiment if run.starts else None,
        experiment_id=run.starts[-1].experiment_id if run.starts else None,
        changed=sorted(changed),
    )


class Server:
    """MLflow, as it is asked for runs.

    Args:
        uri: Where it is; None asks the environment, then takes `mlflow.db` in the working directory.
        message: What is told what is left out.

    Raises:
        ValueError: There is none.
    """

    def __init__(self, uri: str | None, message: Callable[[str], None] = logger.warning) -> None:
        prepare_environment()
        store = find_store(uri, Cursor(), Path.cwd())
        self.uri, self._message = store.uri, message
        if store.database is not None and not store.database.is_file():
            raise ValueError(f"{store.database}: there is no such database of MLflow; name the server with --uri")
        address = Database(store.database, store.options).uri if store.database else store.uri
        try:
            from mlflow import MlflowClient
        except Exception as error:
            raise ValueError(f"mlflow cannot be imported: {one_line(error)}; give folders of runs") from error
        for name in ("alembic", "urllib3.connectionpool", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._client = MlflowClient(tracking_uri=address)

    def experiment(self, name: str, filter_string: str = "") -> Iterator[ComparedRun]:
        """Yield the training runs of an experiment, those that failed or go on included.

        Args:
            name: Of the experiment.
            filter_string: MLflow's, such as `params.optim.lr = '0.001'`.

        Raises:
            ValueError: There is no such experiment, or the filter makes no sense.
        """
        found = self._ask(lambda: self._client.get_experiment_by_name(name))
        if found is None:
            raise ValueError(f"--experiment {name}: MLflow at {self._shown} has no such experiment")
        entities: list[Any] = []
        token: str | None = None
        while token != "":
            page = self._ask(partial(self._page, found.experiment_id, filter_string, token))
            entities += page
            token = page.token or ""
        trained = [one for one in entities if TRAIN in one.data.metrics and one.data.tags.get(KIND_TAG) != COMPARISON]
        for one in sorted(trained, key=lambda run: (run.info.start_time or 0, run.info.run_name or "")):
            yield self._read(one, name)

    def run(self, run_id: str) -> ComparedRun:
        """Read one run.

        Raises:
            ValueError: There is none with this id, or it has no training loss.
        """
        entity = self._ask(lambda: self._client.get_run(run_id))
        if TRAIN not in entity.data.metrics:
            raise ValueError(f"{run_id}: MLflow at {self._shown} has no {TRAIN} of it; give a training run")
        experiment = self._ask(lambda: self._client.get_experiment(entity.info.experiment_id))
        return self._read(entity, experiment.name)

    @property
    def _shown(self) -> str:
        return without_secrets(self.uri)

    def _page(self, experiment_id: str, filter_string: str, token: str | None) -> Any:
        return self._client.search_runs([experiment_id], filter_string, max_results=_PAGE, page_token=token)

    def _ask(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except Exception as error:  # MLflow raises its own, and those of its libraries
            raise ValueError(f"MLflow at {self._shown}: {one_line(error)}") from error

    def _read(self, entity: Any, experiment: str) -> ComparedRun:
        run_id, tags = entity.info.run_id, dict(entity.data.tags)
        folder = Path(tags["run.folder"]) if tags.get("run.folder") else None
        is_here = folder is not None and (folder / METRICS_FILE).is_file()
        if folder is not None and is_here and Cursor.load(folder, logger.debug).run_id == run_id:
            return read_folder(folder, self._message)
        names = [name for name in entity.data.metrics if name in _AXIS_METRICS or _is_read(name)]
        histories = {name: self._history(run_id, name) for name in names}
        steps, columns, times = final_branch(histories)
        changes = settings_of_last_resume(tags)
        config = _texts(entity.data.params | changes)
        rises = {kind: f"events/{kind}" for kind in _EVENTS if f"events/{kind}" in entity.data.metrics}
        series = {name: series_of(column) for name, column in columns.items() if _is_read(name)}
        series[TRAIN] = series_of(_with_bad_losses(columns))
        datasets = [one.dataset for one in entity.inputs.dataset_inputs] if entity.inputs else []
        digest = tags.get("dataset.digest") or (datasets[-1].digest if datasets else "")
        return ComparedRun(
            name=shown(entity.info.run_name or run_id),
            source=f"{self._shown} {run_id}",
            config=config,
            tags=tags,
            dataset={"digest": digest, "name": datasets[-1].name if datasets else ""} if digest else {},
            status=entity.info.status,
            steps=steps,
            axes=_axes(steps, columns, times, config, tags),
            series=series,
            events=events_of_counts({kind: self._history(run_id, name) for kind, name in rises.items()}),
            run_id=run_id,
            experiment=experiment,
            experiment_id=entity.info.experiment_id,
            changed=sorted(changes),
        )

    def _history(self, run_id: str, name: str) -> np.ndarray:
        """Return [M, 3]: step, time in seconds and value of all points of a metric."""
        points = self._ask(lambda: self._client.get_metric_history(run_id, name))
        return np.array([(one.step, one.timestamp / 1e3, one.value) for one in points], float).reshape(-1, 3)


def final_branch(histories: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Return what a run logged on the branch that training finally took.

    Args:
        histories: Step, time in seconds and value of all points, float64 [M, 3], by metric; `loss/train`, which every
            step logs, tells where a run went back.

    Returns:
        Steps, int64 [N], in order; a column for each metric, float64 [N], NaN where it was not logged; and the time at
        which each step was first logged, float64 [N].
    """
    ordered = {name: points[np.argsort(points[:, 1], kind="stable")] for name, points in histories.items()}
    rewinds = _rewinds(ordered.get(TRAIN, np.empty((0, 3))))
    kept = {}
    for name, points in ordered.items():
        alive = np.ones(len(points), bool)
        for when, step in rewinds:
            alive &= (points[:, 0] < step) | (points[:, 1] >= when)
        kept[name] = points[alive]
    everything = np.concatenate([*kept.values(), np.empty((0, 3))])
    steps = np.unique(everything[:, 0]).astype(np.int64)
    times = np.full(len(steps), np.inf)
    np.minimum.at(times, np.searchsorted(steps, everything[:, 0]), everything[:, 1])
    columns = {}
    for name, points in kept.items():
        columns[name] = np.full(len(steps), np.nan)
        columns[name][np.searchsorted(steps, points[:, 0])] = points[:, 2]  # of one step numpy keeps the last
    return steps, columns, times


def events_of_counts(histories: dict[str, np.ndarray]) -> list[RunEvent]:
    """Return the events that counts of them tell, in order of time.

    Args:
        histories: By the kind of event: step, time in seconds and count so far of all points, float64 [M, 3].
    """
    found: list[tuple[float, RunEvent]] = []
    for kind, points in histories.items():
        most = 0.0
        for step, when, count in points[np.lexsort((points[:, 2], points[:, 1]))]:
            if count > most:  # those of a branch that was abandoned have happened too
                found.append((float(when), RunEvent(int(step), kind, "known from its count in MLflow")))
                most = count
    return [event for _, event in sorted(found, key=lambda item: item[0])]


def settings_of_last_resume(tags: dict[str, str]) -> dict[str, str]:
    """Return the settings in which a run went on otherwise than it began.

    MLflow cannot change a parameter. So each resume tags what differs from the parameters of the beginning,
    `resume.N.KEY`, and the last one that has tags says all of it.
    """
    found = [re.fullmatch(r"resume\.(\d+)\.(.+)", key) for key in tags]
    numbers = [int(match[1]) for match in found if match]
    return {match[2]: tags[match[0]] for match in found if match and int(match[1]) == max(numbers)}


def _with_bad_losses(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the training losses, [N]; infinite where a step was done whose loss was no number."""
    losses = columns[TRAIN]
    done = np.zeros(len(losses), bool)
    for name in _OF_EACH_STEP:
        if name in columns:
            done |= ~np.isnan(columns[name])
    return np.where(np.isnan(losses) & done, np.inf, losses)


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as people may see them."""
    return {key: without_secrets(str(value)) for key, value in config.items()}


def _rewinds(points: np.ndarray) -> list[tuple[float, float]]:
    """Return when a run went back, and the first step that it then did again."""
    if not len(points):
        return []
    step, time = points[:, 0], points[:, 1]
    back = np.flatnonzero(np.diff(step) <= 0) + 1
    return [(float(time[index]), float(step[index])) for index in back if time[index] > time[index - 1]]


def _axes(
    steps: np.ndarray,
    columns: dict[str, np.ndarray],
    times: np.ndarray,
    config: dict[str, str],
    tags: dict[str, str],
) -> dict[str, np.ndarray]:
    unknown = np.full(len(times), np.nan)
    tokens, exaflops, hours = (
        filled(columns.get(f"progress/{name}", unknown)) for name in ("tokens", "exaflops", "hours")
    )
    tokens[steps == 0] = 0.0  # of a validation before the first step
    if np.isnan(exaflops).any():
        typed = {key: _typed(value) for key, value in config.items()}
        per_token = number_of(tags.get("flops_per_token"), training_flops(typed) or math.nan)
        exaflops = with_gaps_filled(exaflops, tokens * per_token / 1e18)
    if np.isnan(hours).all() and len(times):
        gaps = np.maximum(np.diff(times, prepend=times[0]), 0)
        hours = np.cumsum(np.where(gaps < _LONGEST_PAUSE_S, gaps, 0)) / 3600
    return {"tokens": tokens, "exaflops": exaflops, "hours": hours}


def _typed(text: str) -> Any:
    """Return the value that a parameter was before it was text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _is_read(metric: str) -> bool:
    return metric in METRICS or is_validation(metric)


def is_folder(source: str) -> bool:
    """Return whether a person means a folder, and not an id of MLflow."""
    return os.sep in source or Path(source).exists() or not (len(source) == 32 and source.isalnum())
