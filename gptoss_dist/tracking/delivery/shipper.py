"""Delivery of a run's local files to MLflow: at least once, idempotent, and able to start over on any server.

MLflow keeps one of equal (key, value, time, step), parameters and tags are set to what they were, and a run is looked
up by a unique tag before it is created. No single line can hold up the others: damaged ones are passed over, and what
the server refuses is cut or left out, one value at a time. mlflow is imported on first use, in the thread that
delivers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.disk import locked
from data_pipeline.secrets import without_secrets
from gptoss_dist.tracking.delivery.cursor import Cursor
from gptoss_dist.tracking.delivery.database import Database
from gptoss_dist.tracking.delivery.environment import DeliveryRefused, Store, Wishes
from gptoss_dist.tracking.delivery.models import LoggedModels
from gptoss_dist.tracking.delivery.requests import (
    NOTE_TAG,
    Requests,
    clean_key,
    clean_text,
    is_refusal,
    is_same,
    is_unknown,
    one_line,
    with_own_text,
)
from gptoss_dist.tracking.jsonl import read_lines
from gptoss_dist.tracking.records import (
    JOURNAL_FILE,
    METRICS_FILE,
    SYSTEM_FOLDER,
    Artifact,
    Checkpoint,
    Damage,
    End,
    MetricsRow,
    Operation,
    RunStart,
    Tag,
    metrics_record,
    operation,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric

_UID_TAG = "gptoss_dist.uid"
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # else MLflow 3 may open it as one of chats and traces
    "mlflow.experiment.primaryMetric.name": "loss/val",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "False",
}
_METRICS_PER_REQUEST = 1000
_MAX_DIGEST = 36
_ATTEMPTS = 3
"""For an operation that fails while the server is well."""

logger = logging.getLogger(__name__)


class MlflowMissing(Exception):
    """The package mlflow is not installed, or it is broken."""


class Shipper:
    """A sender of the two files of a run to MLflow, from where the cursor stands.

    Args:
        run_dir: Folder of the run.
        store: Where MLflow is.
        cursor: What it has acknowledged.
        abandoned: Set from outside to end soon.
        message: What tells the user.
        wishes: What MLflow's environment variables ask for.
        lock_wait_s: Seconds to wait for another process that delivers the same run.
        only_inside: Upload nothing from outside the run's folder, which may come from somewhere else.
    """

    def __init__(
        self,
        run_dir: Path,
        store: Store,
        cursor: Cursor,
        abandoned: threading.Event,
        *,
        message: Callable[[str], None] = logger.warning,
        wishes: Wishes | None = None,
        lock_wait_s: float = 0.0,
        only_inside: bool = False,
    ) -> None:
        self.cursor = cursor
        self.importable = True
        self._run_dir, self._store, self._abandoned = run_dir, store, abandoned
        self._message, self._wishes = message, wishes or Wishes()
        self._lock_wait_s, self._only_inside = lock_wait_s, only_inside
        self._database = Database(store.database, store.options) if store.database else None
        self._uri = store.uri
        self._client: Any = None  # an MlflowClient while there is a connection
        self._logs_models = True
        self._has_models = False
        self._damage = {name: Damage(run_dir / name) for name in (METRICS_FILE, JOURNAL_FILE)}
        self._failures = 0
        """Of the operation that is next."""
        self._unsaved = False

    def pending(self) -> bool:
        """Return whether a complete line of either file has not been acknowledged."""
        return any(
            next(read_lines(self._run_dir / name, offset), None) is not None
            for name, offset in (
                (METRICS_FILE, self.cursor.metrics_offset),
                (JOURNAL_FILE, self.cursor.journal_offset),
            )
        )

    def undo(self) -> None:
        """Remove a half-made database, in a process that ends without waiting for the thread that makes it."""
        if self._database is not None:
            self._database.undo()

    def ship(self) -> None:
        """Send everything that is pending, metrics before artifacts.

        Raises:
            MlflowMissing: There is no mlflow.
            DeliveryRefused: Only the user can help; the message says how.
            Exception: Whatever MLflow raises; try again later.
        """
        self._store.require_address()
        if self._client is not None and not self.pending() and not self._system_files():
            return  # but look at the server once: it may not be the one that the cursor speaks of
        try:
            with _exclusive(self._run_dir / "tracking" / "lock", self._lock_wait_s):
                if self._client is None:
                    self._connect()
                while self.cursor.run_id is None and self._ship_operation():
                    pass  # the first one creates the run, unless it is damaged
                self._ship_metrics()
                while self._ship_operation():
                    self._ship_metrics()
                self._ship_system_metrics()
        except Exception:
            self._client = None  # look again at what the server has: it may come back as another one
            raise
        finally:
            for damage in self._damage.values():
                damage.report(self._message)

    def _connect(self) -> None:
        try:
            from mlflow import MlflowClient
        except Exception as error:
            self.importable = False
            raise MlflowMissing(f"{type(error).__name__}: {error}") from error
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # Their warnings repeat each retry that ours reports once; those of a database have a traceback.
        for name in ("urllib3.connectionpool", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

        if self._database is not None:
            self._database.prepare(self._message)
            self._uri = self._database.uri
        client = MlflowClient(tracking_uri=self._uri)
        client.search_experiments(max_results=1)
        if self.cursor.run_id is not None:
            self._find_run(client, self.cursor.run_id)
        self._store.remember(self.cursor, self._run_dir)
        self._client = client

    def _find_run(self, client: Any, run_id: str) -> None:
        """Look whether the server has the run that the cursor speaks of; else it is sent from the beginning."""
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if not is_unknown(error):
                raise
            run = None
        if run is not None and run.info.lifecycle_stage == "active":
            if self._database is not None:
                self._database.adopt_artifacts(run.info.experiment_id, run_id)
            return
        at = without_secrets(self._store.uri)
        if run_id == self._wishes.run_id:
            raise DeliveryRefused(f"MLFLOW_RUN_ID={run_id}: MLflow at {at} has no such run; correct or unset it")
        self._message(f"MLflow at {at} has no run {run_id}: sending the whole run anew")
        self.cursor.restart()

    def _requests(self) -> Requests:
        assert self.cursor.run_id is not None, "there is no run yet"
        return Requests(self._client, self.cursor.run_id, self._message)

    def _ship_metrics(self) -> None:
        while self.cursor.run_id is not None and not self._abandoned.is_set():
            metrics, offset, damaged = _next_metrics(self._run_dir / METRICS_FILE, self.cursor.metrics_offset)
            if offset == self.cursor.metrics_offset:
                return
            self._send_metrics(metrics)
            self._damage[METRICS_FILE].lines += damaged
            self.cursor.metrics_offset = offset
            self._save_cursor()

    def _send_metrics(self, metrics: list[Metric]) -> None:
        requests = self._requests()
        for i in range(0, len(metrics), _METRICS_PER_REQUEST):
            requests.log_metrics(metrics[i : i + _METRICS_PER_REQUEST])

    def _system_files(self) -> list[Path]:
        """Return the files of system metrics, each of one node, that have grown."""
        sent = self.cursor.system_offsets
        try:
            found = sorted((self._run_dir / SYSTEM_FOLDER).glob("*.jsonl"))
            return [path for path in found if path.stat().st_size > sent.get(path.name, 0)]
        except OSError:
            return []

    def _ship_system_metrics(self) -> None:
        """Send what the nodes have measured; the files belong to others, so that damage in them is passed over."""
        for path in self._system_files() if self.cursor.run_id is not None else ():
            while not self._abandoned.is_set():
                before = self.cursor.system_offsets.get(path.name, 0)
                metrics, offset, _ = _next_metrics(path, before)
                if offset == before:
                    break
                self._send_metrics(metrics)
                self.cursor.system_offsets[path.name] = offset
                self._save_cursor()

    def _ship_operation(self) -> bool:
        """Apply the next line of the journal; return False if there is none."""
        following = next(read_lines(self._run_dir / JOURNAL_FILE, self.cursor.journal_offset), None)
        if following is None or self._abandoned.is_set():
            return False
        record, end = operation(following[0]), following[1]
        if isinstance(record, RunStart):
            self._apply_run(record)
        elif record is not None and self.cursor.run_id is not None:
            self._apply(record)
        self._damage[JOURNAL_FILE].lines += record is None
        self.cursor.journal_offset = end
        self._save_cursor()
        self._failures = 0
        return True

    def _apply(self, record: Operation) -> None:
        requests = self._requests()
        try:
            match record:
                case Tag():
                    value = record.value
                    if record.key == NOTE_TAG:
                        value = with_own_text(value, requests.run().data.tags.get(NOTE_TAG))
                    requests.set_tags({record.key: value})
                case Checkpoint() if self._logs_models:
                    self._logs_models = self._has_models = self._models().log(record)
                case Artifact():
                    self._upload(record)
                case End():
                    self._end(record, requests)
        except Exception as error:
            if not is_refusal(error):
                # A server that fails at one operation, again and again, and is well before and after it.
                self._failures += getattr(error, "error_code", None) == "INTERNAL_ERROR"
                if self._failures < _ATTEMPTS:
                    raise
            requests.run()
            # Repeating would not help, and would hold up what comes after.
            self._message(f"MLflow refuses {record}: {one_line(error)}")

    def _models(self) -> LoggedModels:
        return LoggedModels(self._client, str(self.cursor.run_id), self._run_dir, self._message)

    def _end(self, record: End, requests: Requests) -> None:
        # A clock that jumped back would have the run end before it began.
        end = max(_milliseconds(record.time), requests.run().info.start_time or 0)
        self._client.set_terminated(self.cursor.run_id, record.status, end_time=end)
        if self._has_models:  # the last ones were still being written when they were shown
            self._models().look()

    def _apply_run(self, record: RunStart) -> None:
        """Create the run, or continue it; parameters that it has are never changed."""
        tags = dict(record.tags)
        if created := self.cursor.run_id is None:
            self.cursor.run_id = self._create_run(record)
            self._save_cursor()
        run_id, requests = self.cursor.run_id, self._requests()
        if not created:
            requests.optional("to continue the run", lambda: self._client.update_run(run_id, status="RUNNING"))
        if record.resumed_step is not None:
            tags["resumed_from_step"] = str(record.resumed_step)

        data = requests.run().data
        tags[_UID_TAG] = data.tags.get(_UID_TAG, record.uid)  # a run of MLFLOW_RUN_ID may have none
        params = {clean_key(key): clean_text(value) for key, value in record.params.items()}
        for key in data.params.keys() & params.keys():
            if not is_same(params[key], data.params[key]):
                tags[f"resume.{record.resume}.{key}"] = params[key]
        requests.log_params({key: value for key, value in params.items() if key not in data.params})
        if record.dataset is not None:
            tags["dataset.digest"] = record.dataset.get("digest", "")  # MLflow's own field holds 36 characters
            self._log_dataset(record.dataset, requests)
        if NOTE_TAG in tags:
            tags[NOTE_TAG] = with_own_text(tags[NOTE_TAG], data.tags.get(NOTE_TAG))
        requests.set_tags(tags)

    def _log_dataset(self, dataset: dict[str, str], requests: Requests) -> None:
        from mlflow.entities import Dataset, DatasetInput

        name, digest, source = (clean_text(dataset.get(key, ""), 500) for key in ("name", "digest", "source"))
        entity = Dataset(name, digest[:_MAX_DIGEST], "local", json.dumps({"uri": source}))
        inputs = [DatasetInput(entity)]
        requests.optional(f"the dataset {name}", lambda: self._client.log_inputs(self.cursor.run_id, datasets=inputs))

    def _experiment_id(self, name: str, given_id: str | None = None) -> str:
        """Return the id of an experiment by its name, which is created if there is none, or by the id that is given."""
        from mlflow.exceptions import MlflowException

        client, database = self._client, self._database
        if given_id is None:
            experiment = client.get_experiment_by_name(name)
        else:
            experiment = self._experiment_by_id(given_id)
            name = experiment.name
        if experiment is None:
            try:
                location = database.artifacts if database else None
                return client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS)
            except MlflowException:  # another run has made it meanwhile: those of a sweep start together
                experiment = client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise DeliveryRefused(
                f"MLflow's experiment {name!r} is deleted: restore it with "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, or choose another for the "
                "next run by --tracking.experiment"
            )
        if database is not None:
            database.adopt_artifacts(experiment.experiment_id)
        for key in _EXPERIMENT_TAGS.keys() - experiment.tags.keys():
            with contextlib.suppress(MlflowException):  # how a page opens is worth no more than a try
                client.set_experiment_tag(experiment.experiment_id, key, _EXPERIMENT_TAGS[key])
        return experiment.experiment_id

    def _experiment_by_id(self, experiment_id: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_experiment(experiment_id)
        except MlflowException as error:
            if not is_unknown(error):
                raise
            at = without_secrets(self._store.uri)
            raise DeliveryRefused(
                f"MLFLOW_EXPERIMENT_ID={experiment_id}: MLflow at {at} has no such experiment; correct it, also "
                "for the `sync` that sends this run"
            ) from error

    def _create_run(self, record: RunStart) -> str:
        """Return the id of a new run, or of the one that an earlier attempt made without hearing the answer."""
        # Who sends the run later may correct an id.
        given_id = record.experiment_id and (self._wishes.experiment_id or record.experiment_id)
        client, experiment_id = self._client, self._experiment_id(record.experiment, given_id)
        found = client.search_runs([experiment_id], f"tags.`{_UID_TAG}` = '{record.uid}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = {_UID_TAG: record.uid}
        # MLflow takes a run's user from here, and refuses a second name of the run.
        own = ("mlflow.user", "mlflow.source.")
        tags |= {key: clean_text(value) for key, value in record.tags.items() if key.startswith(own)}
        run = client.create_run(
            experiment_id,
            start_time=_milliseconds(record.time),
            tags=tags,
            run_name=clean_text(record.run_name, 250),
        )
        return run.info.run_id

    def _upload(self, record: Artifact) -> None:
        path = self._run_dir / record.path
        if self._only_inside and not path.resolve().is_relative_to(self._run_dir.resolve()):
            self._message(f"{path} is outside the run's folder: it is not sent")
            return
        try:
            if path.is_dir():
                self._client.log_artifacts(self.cursor.run_id, str(path), record.folder)
            else:
                self._client.log_artifact(self.cursor.run_id, str(path), record.folder)
        except Exception as error:
            # Artifacts can fail for good while the server is well: the file is gone, or its store needs a package or
            # a key that is not here. They must not hold up the rest.
            self._requests().run()
            self._failures += 1
            if path.exists() and self._failures < _ATTEMPTS:
                raise
            self._message(f"{path} is not in MLflow: {one_line(error)}")

    def _save_cursor(self) -> None:
        try:
            self.cursor.save(self._run_dir)
        except OSError as error:  # it stands in memory: only a later process sends again what this one has sent
            if not self._unsaved:
                self._message(
                    f"{self._run_dir / 'tracking'} cannot be written ({error.strerror}): delivery goes on without it"
                )
            self._unsaved = True


def _next_metrics(path: Path, begin: int) -> tuple[list[Metric], int, int]:
    """Return about one request's worth of finite values, the offset behind them, and damaged lines on the way."""
    from mlflow.entities import Metric

    metrics: list[Metric] = []
    offset, damaged = begin, 0
    for line, end in read_lines(path, offset):
        record = metrics_record(line)
        values = record.metrics if isinstance(record, MetricsRow) else {}
        if metrics and len(metrics) + len(values) > _METRICS_PER_REQUEST:
            break
        offset = end
        damaged += record is None
        if isinstance(record, MetricsRow):
            at = _milliseconds(record.time)
            metrics += [
                Metric(clean_key(key), value, at, record.step) for key, value in values.items() if math.isfinite(value)
            ]
    return metrics, offset, damaged


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)


@contextlib.contextmanager
def _exclusive(path: Path, wait_s: float) -> Iterator[None]:
    """Hold a lock between processes; where files cannot be locked, going on is better than never sending."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        held = contextlib.ExitStack()
        held.enter_context(locked(path, wait_s, optional=True))
    except BlockingIOError:
        raise
    except OSError:
        held = contextlib.ExitStack()
    with held:
        yield
