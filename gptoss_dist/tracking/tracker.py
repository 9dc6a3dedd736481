"""Metrics of a run: written to `metrics.jsonl` first, mirrored to MLflow by a thread that training never waits for.

Files of a run, lines of JSON that survive a crash at any byte:

- `metrics.jsonl` is the truth: `{"step": 7, "time": 1730000000.0, "metrics": {"loss/train": 2.5}}`, and
  `{"event": "resume", "step": 5, "time": ...}` where training went back to step 5. Read it with `read_metrics`.
  JSON has no NaN: a value that is not finite is null (MLflow is not sent these), and an infinite one is named beside,
  `"infinite": {"loss/train": "-Infinity"}`.
- `tracking/journal.jsonl`: what else MLflow is to know, in order: the run's parameters, tags, artifacts, checkpoints
  and end; and events, for those who read the run's folder.
- `tracking/system/HOST.jsonl`: what each machine did, as `metrics.jsonl`; its steps are numbers of samples.
- `tracking/cursor.json`: the run's id in MLflow, and how far MLflow has acknowledged these files.

Delivery is at least once and idempotent: MLflow keeps one of equal (key, value, time, step), parameters and tags are
set to what they were, and a run is looked up by a unique tag before it is created. So what did not reach the server
can be sent later from any machine that sees the run's folder:

    python -m gptoss_dist.tracking sync RUN_DIR [--uri URI]

Nothing here ends a run: a file that is damaged or cannot be written costs lines, and the user is told.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.command_line import Program, positional, run_verb
from data_pipeline.disk import move
from data_pipeline.secrets import has_hidden, without_secrets
from gptoss_dist.tracking.delivery.cursor import Cursor
from gptoss_dist.tracking.delivery.database import DatabaseUnusable
from gptoss_dist.tracking.delivery.environment import (
    DeliveryRefused,
    Wishes,
    find_store,
    prepare_environment,
    user_tags,
)
from gptoss_dist.tracking.delivery.requests import NOTE_TAG, OWN_TEXT, one_line
from gptoss_dist.tracking.delivery.shipper import MlflowMissing, Shipper
from gptoss_dist.tracking.delivery.system_metrics import monitor_this_node
from gptoss_dist.tracking.jsonl import JsonLinesWriter
from gptoss_dist.tracking.records import (
    EVENT_KINDS,
    JOURNAL_FILE,
    METRICS_FILE,
    STATUSES,
    Damage,
    MetricsRow,
    Resumed,
    RunStart,
    free_number,
    metrics_line,
    metrics_records,
    run_starts,
)

logger = logging.getLogger(__name__)

DEFAULT_EXPERIMENT = "gptoss_dist"

STANDING_TAGS = ("state", "best_val_loss")
"""Tags that a run with a note sets anew as it goes on."""

_MAX_BACKOFF_S = 60.0
_DRAIN_ATTEMPTS, _DRAIN_PAUSE_S = 3, 0.5


class Tracker:
    """The record of one run, made on rank 0 only.

    Nothing here waits for MLflow: every method appends a line to a local file and returns; the import of mlflow, the
    creation of the run and all requests happen in a daemon thread, again and again until the server answers.

    Args:
        run_dir: Folder of the run; created if missing. A fresh start moves an earlier run's `metrics.jsonl` and
            `tracking/` there aside (`metrics.1.jsonl`, `tracking.1`), a resume continues them.
        run_name: The run's name in MLflow, unless `MLFLOW_RUN_NAME` gives one.
        experiment: The experiment's name in MLflow; without it `MLFLOW_EXPERIMENT_NAME`, then `gptoss_dist`.
        experiment_id: Its id, in the place of a name; without either `MLFLOW_EXPERIMENT_ID`, if there is no
            `MLFLOW_EXPERIMENT_NAME`.
        uri: Tracking URI. Without it `MLFLOW_TRACKING_URI`, then (on resume) the run's earlier one, then
            `mlflow.db` in the working directory.
        enabled: Mirror to MLflow; the local files are written in any case, so `sync` works later either way.
        params: The run's configuration, flat; values are recorded as text.
        tags: Further properties, such as the commit or the device.
        dataset: `name`, `digest` (the manifest's hash) and `source` of the training data.
        resume_run_id: MLflow's id of the run to continue, from the checkpoint; without it the one last used in
            `run_dir`. Its parameters stay; new values become tags `resume.<n>.<key>`. `MLFLOW_RUN_ID` comes first.
        resumed_step: The step of the checkpoint; recorded rows of later steps belong to an abandoned branch.
        is_child: Whether this is a run below another one: `MLFLOW_RUN_ID` and `MLFLOW_RUN_NAME` mean that one.
        interval_s: Seconds between deliveries.
        system_metrics_every_s: Seconds between samples of what this machine does, unless MLflow's variables say
            otherwise; 0 takes none.
        node: This machine's name in these, for a run of several.
        message: What tells the user what goes wrong, also from the delivering thread; by default a warning in the log.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        run_name: str,
        experiment: str | None = None,
        experiment_id: str | None = None,
        uri: str | None = None,
        enabled: bool = True,
        params: dict | None = None,
        tags: dict | None = None,
        dataset: dict | None = None,
        resume_run_id: str | None = None,
        resumed_step: int | None = None,
        is_child: bool = False,
        interval_s: float = 5.0,
        system_metrics_every_s: float = 0.0,
        node: str | None = None,
        message: Callable[[str], None] = logger.warning,
    ) -> None:
        self._run_dir, self._interval_s, self._message = Path(run_dir), interval_s, message
        resumed = resume_run_id is not None or resumed_step is not None
        self._make_room(resumed)
        about_mlflow = message if enabled else logger.debug
        wishes = Wishes.read(about_mlflow, is_child=is_child)

        cursor = _cursor_of(self._run_dir, wishes.run_id or resume_run_id, about_mlflow)
        store = find_store(uri, cursor, self._run_dir)
        store.remember(cursor, self._run_dir)
        with contextlib.suppress(OSError):  # told when there is something to keep
            cursor.save(self._run_dir)

        starts = self._earlier_starts()
        self._metrics = JsonLinesWriter(self._run_dir / METRICS_FILE, message)
        self._journal = JsonLinesWriter(self._run_dir / JOURNAL_FILE, message)
        if resumed_step is not None:
            self._metrics.append({"event": "resume", "step": resumed_step, "time": _now()})
        self._operation(
            "run",
            uid=starts[0].uid if starts else uuid.uuid4().hex,
            run_name=wishes.run_name or run_name,
            experiment=experiment or wishes.experiment or DEFAULT_EXPERIMENT,
            experiment_id=experiment_id or (wishes.experiment_id if experiment is None else None),
            params=_texts(params),
            tags=self._tags(_texts(tags), wishes.tags),
            dataset=None if dataset is None else _texts(dataset),
            resume=1 + sum(start.resume > 0 for start in starts) if resumed else 0,
            resumed_step=resumed_step,
        )

        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._problem, self._ended = "", False
        self._shipper = Shipper(self._run_dir, store, cursor, self._abandoned, message=message, wishes=wishes)
        self._monitor = monitor_this_node(self._run_dir, system_metrics_every_s, wishes, node, message)
        self._thread = None
        if enabled:
            prepare_environment()
            self._thread = threading.Thread(target=self._deliver, name="mlflow-tracking", daemon=True)
            self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run, which belongs into checkpoints; None until the server has created it."""
        return self._shipper.cursor.run_id

    def log(self, step: int, metrics: dict[str, float]) -> float:
        """Record values of one step, as one line in one write, unbuffered but not fsynced.

        Values are converted by `float`, so hand over numbers that are already on the host. Several calls for one step
        add up. A full disk costs the line and one warning.

        Returns:
            The time that the line has, in seconds since 1970.
        """
        now = _now()
        self._metrics.append(metrics_line(int(step), now, {key: float(value) for key, value in metrics.items()}))
        return now

    def tag(self, key: str, value: object) -> None:
        """Set a property of the run."""
        self._operation("tag", key=key, value=str(value))

    def event(self, step: int, kind: str, text: str) -> None:
        """Record that something happened after a step.

        Args:
            step: The step.
            kind: One of `EVENT_KINDS`.
            text: What happened, in one line.

        Raises:
            ValueError: There is no such kind.
        """
        if kind not in EVENT_KINDS:
            raise ValueError(f"kind={kind!r} is not one of {', '.join(EVENT_KINDS)}")
        self._operation("event", step=int(step), kind=kind, text=text)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Have a file or directory uploaded, as it is when its turn comes, into `folder` of the run's artifacts."""
        self._operation("artifact", path=self._inside(path), folder=folder)

    def checkpoint(self, step: int, path: str | Path, metrics: dict[str, float], time: float | None = None) -> None:
        """Have a checkpoint shown as a logged model, without its weights.

        Args:
            step: Of after this step it is.
            path: Its folder.
            metrics: What is known of its weights.
            time: That of these metrics, as `log` returned it.
        """
        finite = {key: float(value) for key, value in metrics.items() if math.isfinite(value)}
        record = {"op": "checkpoint", "time": _now() if time is None else time, "step": int(step)}
        self._journal.append(record | {"path": self._inside(path), "metrics": finite})

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Record how the run ended, once; artifacts may follow.

        Raises:
            ValueError: `status` is not one of MLflow's.
        """
        if status not in STATUSES:
            raise ValueError(f"status={status!r} is not FINISHED, FAILED or KILLED")
        if not self._ended:
            self._ended = True
            self._operation("end", status=status)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", timeout: float = 30.0) -> None:
        """Record how the run ended, as `end`, and wait up to `timeout` seconds for the delivery of what is left.

        What cannot be delivered stays in the run's folder, and the command that sends it is printed.

        Raises:
            ValueError: `status` is not one of MLflow's.
        """
        if self._closing.is_set():
            return
        self.end(status)
        self._monitor.close()
        self._closing.set()
        self._metrics.close()
        self._journal.close()
        if self._thread is None:
            return
        self._thread.join(timeout)
        self._abandoned.set()
        if self._thread.is_alive():
            self._shipper.undo()
        if self._shipper.importable and self._is_pending():
            self._message(
                f"MLflow has not received everything{self._problem}; nothing is lost. Send the rest with:\n"
                f"    python -m gptoss_dist.tracking sync {shlex.quote(str(self._run_dir))}"
                f"{' --uri URI' if has_hidden(self._shipper.cursor.uri) else ''}"
            )

    def _inside(self, path: str | Path) -> str:
        """Return a path, relative inside the run's folder, which may be moved before a `sync`."""
        path = Path(path).absolute()
        with contextlib.suppress(ValueError):
            path = path.relative_to(self._run_dir.absolute())
        return str(path)

    def _tags(self, tags: dict[str, str], wished: dict[str, str]) -> dict[str, str]:
        """Return the properties that a run begins with: those of MLFLOW_TAGS first, but what the run keeps current."""
        if reserved := [key for key in STANDING_TAGS if key in wished and NOTE_TAG in tags]:
            self._message(
                f"MLFLOW_TAGS: {', '.join(reserved)} is kept current by the run and not taken; choose another name"
            )
        wished = {key: value for key, value in wished.items() if key not in reserved}
        if NOTE_TAG in wished and NOTE_TAG in tags:
            wished[NOTE_TAG] = f"{tags[NOTE_TAG]}\n\n{OWN_TEXT}\n\n{wished[NOTE_TAG]}"
        return user_tags() | tags | wished

    def _make_room(self, resumed: bool) -> None:
        try:
            if not resumed:
                _set_aside(self._run_dir)
            (self._run_dir / JOURNAL_FILE).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._message(f"{self._run_dir}: {error}; training goes on, and what it records may be incomplete")

    def _earlier_starts(self) -> list[RunStart]:
        try:
            return run_starts(self._run_dir)
        except OSError:
            return []

    def _operation(self, op: str, **fields) -> None:
        self._journal.append({"op": op, "time": _now(), **fields})

    def _is_pending(self) -> bool:
        try:
            return self._shipper.pending()
        except OSError:
            return True

    def _deliver(self) -> None:
        """Work as the thread: ship, wait, and on failure wait longer; once closing, drain in a few attempts."""
        failures = drain_failures = 0
        while not self._abandoned.is_set():
            draining = self._closing.is_set()  # before shipping: what was recorded by then will have been sent
            try:
                self._shipper.ship()
                if failures:
                    self._message("MLflow answers again; everything recorded meanwhile has been sent")
                failures, self._problem = 0, ""
                if draining:
                    return
            except MlflowMissing as error:
                self._message(f"mlflow cannot be imported ({error}): metrics stay in {self._run_dir} only")
                return
            except Exception as error:
                failures += 1
                drain_failures += draining
                has_remedy = isinstance(error, (DatabaseUnusable, DeliveryRefused))
                text = without_secrets(str(error)) if has_remedy else one_line(error)
                self._problem = f" ({text})"
                if failures == 1 and not self._abandoned.is_set():
                    self._message(f"MLflow did not take the metrics; training goes on and they are sent later. {text}")
                if drain_failures == _DRAIN_ATTEMPTS:
                    return
            if draining:
                self._abandoned.wait(_DRAIN_PAUSE_S)
            else:
                self._closing.wait(min(_MAX_BACKOFF_S, 2**failures) if failures else self._interval_s)


def read_metrics(run_dir: str | Path, message: Callable[[str], None] = logger.warning) -> list[dict]:
    """Return the metrics of the branch that training finally took, one row per step, in order of steps.

    Args:
        run_dir: Folder of the run.
        message: What is told how many lines are damaged, if any is.

    Returns:
        Rows `{"step": int, "time": float, "metrics": dict[str, float]}`. Where a step was logged more than once the
        last value of each metric counts; after a resume at step k earlier rows beyond k are gone. Torn and damaged
        lines are passed over.

    Raises:
        ValueError: The folder has no metrics.
    """
    rows: dict[int, dict] = {}
    for record in _read_records(run_dir, message):
        if isinstance(record, Resumed):
            rows = {step: row for step, row in rows.items() if step <= record.step}
        else:
            row = rows.setdefault(record.step, {"step": record.step, "metrics": {}})
            row["time"] = record.time
            row["metrics"].update(record.metrics)
    return [rows[step] for step in sorted(rows)]


def read_resume_steps(run_dir: str | Path) -> list[int]:
    """Return the steps at which the run was resumed and whose continuation was not itself abandoned, in order."""
    steps: list[int] = []
    for record in _read_records(run_dir, logger.debug):
        if isinstance(record, Resumed):
            steps = [step for step in steps if step < record.step] + [record.step]
    return steps


def sync(run_dir: str | Path, uri: str | None = None, message: Callable[[str], None] = logger.warning) -> str:
    """Send to MLflow what it has not acknowledged; safe to repeat, and to interrupt.

    Args:
        run_dir: Folder of the run. Only artifacts that lie in it are sent.
        uri: Another server than the run's own; the whole run is sent to a server that does not know it.
        message: What is told what is left out.

    Returns:
        MLflow's id of the run.

    Raises:
        ValueError: The folder holds no run.
        Exception: Whatever MLflow raises while the server does not answer.
    """
    run_dir = Path(run_dir)
    if not (run_dir / JOURNAL_FILE).is_file():
        raise ValueError(f"{run_dir} holds no {JOURNAL_FILE}; give the folder of a run")
    prepare_environment()
    wishes = Wishes.read(message)
    wishes = Wishes(run_id=wishes.run_id, experiment_id=wishes.experiment_id)
    cursor = _cursor_of(run_dir, wishes.run_id, message)
    shipper = Shipper(
        run_dir,
        find_store(uri, cursor, run_dir),
        cursor,
        threading.Event(),
        message=message,
        wishes=wishes,
        lock_wait_s=15.0,
        only_inside=True,
    )
    shipper.ship()
    if cursor.run_id is None:
        raise ValueError(f"{run_dir / JOURNAL_FILE} does not say how the run began; nothing can be sent")
    return cursor.run_id


def _cursor_of(run_dir: Path, run_id: str | None, message: Callable[[str], None]) -> Cursor:
    """Return what a run of MLflow has acknowledged: nothing, if it is another one than before."""
    cursor = Cursor.load(run_dir, message)
    if run_id is not None and run_id != cursor.run_id:
        cursor.restart()
        cursor.run_id = run_id
    return cursor


def _read_records(run_dir: str | Path, message: Callable[[str], None]) -> Iterator[MetricsRow | Resumed]:
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run")
    damage = Damage(path)
    yield from metrics_records(path, damage)
    damage.report(message)


def _now() -> float:
    return round(time.time(), 3)


def _texts(values: dict | None) -> dict[str, str]:
    return {key: str(value) for key, value in (values or {}).items()}


def _set_aside(run_dir: Path) -> None:
    """Keep what an earlier run left in this folder under other names, so that a fresh start does not mix with it."""
    metrics, tracking = run_dir / METRICS_FILE, (run_dir / JOURNAL_FILE).parent
    if not (metrics.exists() or tracking.exists()):
        return
    n = free_number(run_dir, "metrics.{}.jsonl", "tracking.{}")
    if metrics.exists():
        move(metrics, run_dir / f"metrics.{n}.jsonl")
    if tracking.exists():
        move(tracking, run_dir / f"tracking.{n}")


@dataclass
class SyncOptions:
    """Send to MLflow what it has not yet received of a run."""

    run_dir: str = positional("RUN_DIR")
    """Folder of the run."""
    uri: str | None = None
    """Tracking URI; null is $MLFLOW_TRACKING_URI, then the run's own."""


def main(argv: list[str] | None = None) -> int:
    """Do what the command line of `python -m gptoss_dist.tracking` asks for; return the exit code."""
    program = Program("python -m gptoss_dist.tracking", prefix="not sent")
    return run_verb(program, {"sync": (SyncOptions, _sync)}, argv, description="What a run recorded, and MLflow.")


def _sync(options: SyncOptions) -> None:
    try:
        run_id = sync(options.run_dir, options.uri, lambda text: print(text, file=sys.stderr))
    except Exception as error:  # MLflow raises its own
        raise ValueError(" ".join(without_secrets(str(error)).split())) from error
    print(f"MLflow run {run_id} is complete")
