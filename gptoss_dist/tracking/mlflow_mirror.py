"""Delivery of a run's local files to MLflow: at least once, idempotent, and able to start over on any server.

MLflow keeps one of equal (key, value, time, step), parameters and tags are set to what they were, and a run is looked
up by a unique tag before it is created. mlflow is imported on first use, in the thread that delivers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.disk import locked, replacing
from gptoss_dist.tracking.jsonl import read_lines

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
JOURNAL_FILE = "tracking/journal.jsonl"
CURSOR_FILE = "tracking/cursor.json"
_UID_TAG = "gptoss_dist.uid"

# Read by mlflow at import or per request. Its own defaults block for minutes on a dead server (7 retries, 120 s).
_MLFLOW_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
# Limits of MLflow's REST API and SQL store.
_METRICS_PER_REQUEST, _KEYS_PER_REQUEST = 1000, 100
_MAX_KEY, _MAX_VALUE, _MAX_DIGEST = 250, 5000, 36

_ARTIFACT_ATTEMPTS = 3


@dataclass
class Cursor:
    """What MLflow has acknowledged.

    It is written after the acknowledgement, so that a crash in between repeats something and never skips it.
    """

    uri: str | None = None
    run_id: str | None = None
    metrics_offset: int = 0
    journal_offset: int = 0

    @classmethod
    def load(cls, run_dir: Path) -> Cursor:
        """Read the cursor of a run; one that is missing or damaged begins anew."""
        try:
            return cls(**json.loads((run_dir / CURSOR_FILE).read_text()))
        except (FileNotFoundError, ValueError, TypeError):  # absent or damaged: start over, which repeats but is safe
            return cls()

    def save(self, run_dir: Path) -> None:
        """Write the cursor, whole or not at all."""
        with replacing(run_dir / CURSOR_FILE) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self)))


class MlflowMissing(Exception):
    """The package mlflow is not installed, or it is broken."""


class Shipper:
    """A sender of the two files of a run to MLflow, from where the cursor stands."""

    def __init__(
        self, run_dir: Path, uri: str, cursor: Cursor, abandoned: threading.Event, lock_wait_s: float = 0.0
    ) -> None:
        self.cursor = cursor
        self.importable = True
        self._run_dir = run_dir
        self._uri = uri
        self._abandoned = abandoned
        self._lock_wait_s = lock_wait_s
        self._client: Any = None  # an MlflowClient while there is a connection
        self._artifact_failures = 0

    def pending(self) -> bool:
        """Return whether a complete line of either file has not been acknowledged."""
        return any(
            next(read_lines(self._run_dir / name, offset), None) is not None
            for name, offset in (
                (METRICS_FILE, self.cursor.metrics_offset),
                (JOURNAL_FILE, self.cursor.journal_offset),
            )
        )

    def ship(self) -> None:
        """Send everything that is pending, metrics before artifacts.

        Raises:
            MlflowMissing: There is no mlflow.
            Exception: Whatever MLflow raises; try again later.
        """
        if self._client is not None and not self.pending():
            return  # but look at the server once: it may not be the one that the cursor speaks of
        try:
            with _exclusive(self._run_dir / "tracking" / "lock", self._lock_wait_s):
                if self._client is None:
                    self._connect()
                if self.cursor.run_id is None:
                    self._ship_operation()  # the first one creates the run
                self._ship_metrics()
                while self._ship_operation():
                    self._ship_metrics()
        except Exception:
            self._client = None  # look again at what the server has: it may come back as another one
            raise

    def _connect(self) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except Exception as error:
            self.importable = False
            raise MlflowMissing(f"{type(error).__name__}: {error}") from error
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # Its warning repeats each retry that ours reports once.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

        with _first_touch(self._uri):
            client = MlflowClient(tracking_uri=self._uri)
            client.search_experiments(max_results=1)
        if self.cursor.run_id is not None:
            try:
                known = client.get_run(self.cursor.run_id).info.lifecycle_stage == "active"
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                known = False
            if not known:
                logger.warning(
                    "MLflow at %s has no run %s: sending the whole run anew", scrub(self._uri), self.cursor.run_id
                )
                self.cursor.run_id, self.cursor.metrics_offset, self.cursor.journal_offset = None, 0, 0
        self.cursor.uri = scrub(self._uri)
        self._client = client

    def _ship_metrics(self) -> None:
        while self.cursor.run_id is not None and not self._abandoned.is_set():
            metrics, offset = self._next_metrics()
            if offset == self.cursor.metrics_offset:
                return
            for i in range(0, len(metrics), _METRICS_PER_REQUEST):
                chunk = metrics[i : i + _METRICS_PER_REQUEST]
                self._client.log_batch(self.cursor.run_id, metrics=chunk, synchronous=True)
            self.cursor.metrics_offset = offset
            self.cursor.save(self._run_dir)

    def _next_metrics(self) -> tuple[list[Metric], int]:
        """Return about one request's worth of finite values, and the offset behind them."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        offset = self.cursor.metrics_offset
        for record, end in read_lines(self._run_dir / METRICS_FILE, offset):
            values = {key: float(value) for key, value in record.get("metrics", {}).items()}
            if metrics and len(metrics) + len(values) > _METRICS_PER_REQUEST:
                break
            offset = end
            metrics += [
                Metric(_key(key), value, _milliseconds(record), record["step"])
                for key, value in values.items()
                if math.isfinite(value)
            ]
        return metrics, offset

    def _ship_operation(self) -> bool:
        """Apply the next line of the journal; return False if there is none."""
        following = next(read_lines(self._run_dir / JOURNAL_FILE, self.cursor.journal_offset), None)
        if following is None or self._abandoned.is_set():
            return False
        record, end = following
        if record.get("op") == "run":
            self._apply_run(record)
        elif record and self.cursor.run_id is not None:
            self._apply(record)
        self.cursor.journal_offset = end
        self.cursor.save(self._run_dir)
        return True

    def _apply(self, record: dict) -> None:
        from mlflow.exceptions import MlflowException

        run_id = self.cursor.run_id
        try:
            match record["op"]:
                case "tag":
                    self._client.set_tag(run_id, _key(record["key"]), record["value"][:_MAX_VALUE])
                case "artifact":
                    self._upload(self._run_dir / record["path"], record["folder"])
                case "end":
                    self._client.set_terminated(run_id, record["status"], end_time=_milliseconds(record))
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            # Repeating would not help, and would hold up what comes after.
            logger.warning("MLflow refuses %s: %s", {k: record[k] for k in record if k != "time"}, error)

    def _apply_run(self, record: dict) -> None:
        """Create the run, or continue it; parameters that it has are never changed."""
        from mlflow.entities import Dataset, DatasetInput, Param, RunTag

        client = self._client
        tags = dict(record["tags"])
        if self.cursor.run_id is None:
            self.cursor.run_id = self._create_run(record)
            self.cursor.save(self._run_dir)
        else:
            client.update_run(self.cursor.run_id, status="RUNNING")
        run_id = self.cursor.run_id
        if record["resumed_step"] is not None:
            tags["resumed_from_step"] = str(record["resumed_step"])

        present = client.get_run(run_id).data.params
        params = {_key(key): value[:_MAX_VALUE] for key, value in record["params"].items()}
        for key in present.keys() & params.keys():
            if present[key] != params[key]:
                tags[f"resume.{record['resume']}.{key}"] = params[key]
        new = [Param(key, value) for key, value in params.items() if key not in present]
        for i in range(0, len(new), _KEYS_PER_REQUEST):
            client.log_batch(run_id, params=new[i : i + _KEYS_PER_REQUEST], synchronous=True)

        if dataset := record["dataset"]:
            digest = str(dataset["digest"])
            tags["dataset.digest"] = digest  # MLflow's own field holds 36 characters
            source = json.dumps({"uri": str(dataset["source"])})
            entity = Dataset(str(dataset["name"]), digest[:_MAX_DIGEST], "local", source)
            client.log_inputs(run_id, datasets=[DatasetInput(entity)])
        entities = [RunTag(_key(key), value[:_MAX_VALUE]) for key, value in tags.items()]
        for i in range(0, len(entities), _KEYS_PER_REQUEST):
            client.log_batch(run_id, tags=entities[i : i + _KEYS_PER_REQUEST], synchronous=True)

    def _create_run(self, record: dict) -> str:
        """Return the id of a new run, or of the one that an earlier attempt made without hearing the answer."""
        client = self._client
        experiment = client.get_experiment_by_name(record["experiment"])
        if experiment is None:
            database = _sqlite_path(self._uri)
            # MLflow would put a database's artifacts into ./mlruns of whatever process comes first.
            location = (database.parent / "mlartifacts").as_uri() if database else None
            experiment_id = client.create_experiment(record["experiment"], artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        found = client.search_runs([experiment_id], f"tags.`{_UID_TAG}` = '{record['uid']}'", max_results=1)
        if found:
            return found[0].info.run_id
        run = client.create_run(
            experiment_id,
            start_time=_milliseconds(record),
            tags={_UID_TAG: record["uid"]},
            run_name=record["run_name"],
        )
        return run.info.run_id

    def _upload(self, path: Path, folder: str | None) -> None:
        try:
            if path.is_dir():
                self._client.log_artifacts(self.cursor.run_id, str(path), folder)
            else:
                self._client.log_artifact(self.cursor.run_id, str(path), folder)
            self._artifact_failures = 0
        except Exception as error:
            # Artifacts can fail for good while the server is well: the file is gone, or its store needs a package or
            # a key that is not here. They must not hold up the rest.
            self._client.get_run(self.cursor.run_id)
            self._artifact_failures += 1
            if path.exists() and self._artifact_failures < _ARTIFACT_ATTEMPTS:
                raise
            self._artifact_failures = 0
            logger.warning("%s is not in MLflow: %s", path, scrub(f"{type(error).__name__}: {error}")[:300])


def _milliseconds(record: dict) -> int:
    return round(1000 * record["time"])


def _key(key: str) -> str:
    """Return a name that MLflow takes for a metric, parameter or tag.

    One bad name would make it refuse the whole request.
    """
    return re.sub(r"[^\w\-. :/]", "_", key)[:_MAX_KEY]


def prepare_environment() -> None:
    """Have MLflow fail fast and stay quiet, unless the user has set otherwise.

    Call before mlflow is imported.
    """
    for key, value in _MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def resolve_uri(uri: str | None, recorded: str | None) -> str:
    """Return the tracking URI: as given, from the environment, as recorded, or a database in this directory."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or recorded or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    database = _sqlite_path(uri)
    return f"sqlite:///{database}" if database else uri


def _sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of a sqlite URI's file; None for any other URI and for a database in memory."""
    path = uri.removeprefix("sqlite:///")
    return Path(path).absolute() if path != uri and path and not path.startswith(":memory:") else None


def scrub(text: str) -> str:
    """Return `text` without user names and passwords of URLs, fit to be printed and stored."""
    return re.sub(r"//[^/@\s]+@", "//", text)


def _exclusive(path: Path, wait_s: float) -> contextlib.AbstractContextManager:
    """Hold a lock between processes; where files cannot be locked, going on is better than never sending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return locked(path, wait_s, optional=True)


def _first_touch(uri: str) -> contextlib.AbstractContextManager:
    """Hold the lock under which a process creates the tables of a sqlite file.

    Several processes that create them at once leave the file unusable.
    """
    database = _sqlite_path(uri)
    if database is None:
        return contextlib.nullcontext()
    return _exclusive(database.with_name(f"{database.name}.lock"), wait_s=60.0)
