"""Metrics of a run: written to `metrics.jsonl` first, mirrored to MLflow by a thread that training never waits for.

Files of a run, lines of JSON that survive a crash at any byte:

- `metrics.jsonl` is the truth: `{"step": 7, "time": 1730000000.0, "metrics": {"loss/train": 2.5}}`, and
  `{"event": "resume", "step": 5, "time": ...}` where training went back to step 5. Read it with `read_metrics`.
  JSON has no NaN: non-finite values are the strings "NaN", "Infinity" and "-Infinity" (MLflow is not sent these).
- `tracking/journal.jsonl`: what else MLflow is to know, in order: the run's parameters, tags, artifacts and end.
- `tracking/cursor.json`: the run's id in MLflow, and how far MLflow has acknowledged both files.

Delivery is at least once and idempotent: MLflow keeps one of equal (key, value, time, step), parameters and tags are
set to what they were, and a run is looked up by a unique tag before it is created. So what did not reach the server
can be sent later from any machine that sees the run's folder:

    python -m gptoss_dist.tracking sync RUN_DIR [--uri URI]
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.command_line import Program, positional, run_verb
from data_pipeline.disk import move
from gptoss_dist.tracking.jsonl import JsonLinesWriter, read_lines
from gptoss_dist.tracking.mlflow_mirror import (
    JOURNAL_FILE,
    METRICS_FILE,
    Cursor,
    MlflowMissing,
    Shipper,
    prepare_environment,
    resolve_uri,
    scrub,
)

logger = logging.getLogger(__name__)

_MAX_BACKOFF_S = 60.0
_DRAIN_ATTEMPTS, _DRAIN_PAUSE_S = 3, 0.5


class Tracker:
    """The record of one run, made on rank 0 only.

    Nothing here waits for MLflow: every method appends a line to a local file and returns; the import of mlflow, the
    creation of the run and all requests happen in a daemon thread, again and again until the server answers.

    Args:
        run_dir: Folder of the run; created if missing. A fresh start moves an earlier run's `metrics.jsonl` and
            `tracking/` there aside (`metrics.1.jsonl`, `tracking.1`), a resume continues them.
        run_name: The run's name in MLflow.
        experiment: The experiment's name in MLflow.
        uri: Tracking URI. Without it `MLFLOW_TRACKING_URI`, then (on resume) the run's earlier one, then
            `sqlite:///<working directory>/mlflow.db`.
        enabled: Mirror to MLflow; the local files are written in any case, so `sync` works later either way.
        params: The run's configuration, flat; values are recorded as text.
        tags: Further properties, such as the commit or the device.
        dataset: `name`, `digest` (the manifest's hash) and `source` of the training data.
        resume_run_id: MLflow's id of the run to continue, from the checkpoint; without it the one last used in
            `run_dir`. Its parameters stay; new values become tags `resume.<n>.<key>`.
        resumed_step: The step of the checkpoint; recorded rows of later steps belong to an abandoned branch.
        interval_s: Seconds between deliveries.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        run_name: str,
        experiment: str,
        uri: str | None = None,
        enabled: bool = True,
        params: dict | None = None,
        tags: dict | None = None,
        dataset: dict | None = None,
        resume_run_id: str | None = None,
        resumed_step: int | None = None,
        interval_s: float = 5.0,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._interval_s = interval_s
        resumed = resume_run_id is not None or resumed_step is not None
        if not resumed:
            _set_aside(self._run_dir)
        (self._run_dir / JOURNAL_FILE).parent.mkdir(parents=True, exist_ok=True)

        cursor = Cursor.load(self._run_dir)
        if resume_run_id is not None and resume_run_id != cursor.run_id:
            cursor = Cursor(uri=cursor.uri, run_id=resume_run_id)
        uri = resolve_uri(uri, cursor.uri)
        cursor.uri = scrub(uri)
        cursor.save(self._run_dir)

        starts = [record for record, _ in read_lines(self._run_dir / JOURNAL_FILE) if record.get("op") == "run"]
        self._metrics = JsonLinesWriter(self._run_dir / METRICS_FILE)
        self._journal = JsonLinesWriter(self._run_dir / JOURNAL_FILE)
        if resumed_step is not None:
            self._metrics.append({"event": "resume", "step": resumed_step, "time": _now()})
        self._operation(
            "run",
            uid=starts[0]["uid"] if starts else uuid.uuid4().hex,
            run_name=run_name,
            experiment=experiment,
            params={key: str(value) for key, value in (params or {}).items()},
            tags={key: str(value) for key, value in (tags or {}).items()},
            dataset=dataset,
            resume=1 + sum(start["resume"] > 0 for start in starts) if resumed else 0,
            resumed_step=resumed_step,
        )

        self._closing, self._abandoned = threading.Event(), threading.Event()
        self._shipper = Shipper(self._run_dir, uri, cursor, self._abandoned)
        self._thread = None
        if enabled:
            prepare_environment()
            self._thread = threading.Thread(target=self._deliver, name="mlflow-tracking", daemon=True)
            self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run, which belongs into checkpoints; None until the server has created it."""
        return self._shipper.cursor.run_id

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record values of one step, as one line in one write, unbuffered but not fsynced.

        Values are converted by `float`, so hand over numbers that are already on the host. Several calls for one step
        add up. A full disk costs the line and one warning.
        """
        values = {key: _encode(value) for key, value in metrics.items()}
        self._metrics.append({"step": int(step), "time": _now(), "metrics": values})

    def tag(self, key: str, value: object) -> None:
        """Set a property of the run."""
        self._operation("tag", key=key, value=str(value))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Have a file or directory uploaded, as it is when its turn comes, into `folder` of the run's artifacts."""
        path = Path(path).absolute()
        with contextlib.suppress(ValueError):  # relative inside the run's folder, which may be moved before a `sync`
            path = path.relative_to(self._run_dir.absolute())
        self._operation("artifact", path=str(path), folder=folder)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED", timeout: float = 30.0) -> None:
        """Record how the run ended and wait up to `timeout` seconds for the delivery of what is left.

        What cannot be delivered stays in the run's folder, and the command that sends it is printed.

        Raises:
            ValueError: `status` is not one of MLflow's.
        """
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"status={status!r} is not FINISHED, FAILED or KILLED")
        if self._closing.is_set():
            return
        self._operation("end", status=status)
        self._closing.set()
        self._metrics.close()
        self._journal.close()
        if self._thread is None:
            return
        self._thread.join(timeout)
        self._abandoned.set()
        if self._shipper.importable and self._shipper.pending():
            logger.warning(
                "MLflow has not received everything; nothing is lost. Send the rest with:\n    %s",
                f"python -m gptoss_dist.tracking sync {self._run_dir}",
            )

    def _operation(self, op: str, **fields) -> None:
        self._journal.append({"op": op, "time": _now(), **fields})

    def _deliver(self) -> None:
        """Work as the thread: ship, wait, and on failure wait longer; once closing, drain in a few attempts."""
        failures = drain_failures = 0
        while not self._abandoned.is_set():
            draining = self._closing.is_set()  # before shipping: what was recorded by then will have been sent
            try:
                self._shipper.ship()
                if failures:
                    logger.warning("MLflow answers again; everything recorded meanwhile has been sent")
                failures = 0
                if draining:
                    return
            except MlflowMissing as error:
                logger.warning("mlflow cannot be imported (%s): metrics stay in %s only", error, self._run_dir)
                return
            except Exception as error:
                failures += 1
                drain_failures += draining
                if failures == 1:
                    text = scrub(f"{type(error).__name__}: {error}")[:300]
                    logger.warning(
                        "MLflow did not take the metrics; training goes on and they are sent later. %s", text
                    )
                if drain_failures == _DRAIN_ATTEMPTS:
                    return
            if draining:
                self._abandoned.wait(_DRAIN_PAUSE_S)
            else:
                self._closing.wait(min(_MAX_BACKOFF_S, 2**failures) if failures else self._interval_s)


def read_metrics(run_dir: str | Path) -> list[dict]:
    """Return the metrics of the branch that training finally took, one row per step, in order of steps.

    Returns:
        Rows `{"step": int, "time": float, "metrics": dict[str, float]}`. Where a step was logged more than once the
        last value of each metric counts; after a resume at step k earlier rows beyond k are gone. Torn lines are
        skipped.

    Raises:
        ValueError: The folder has no metrics.
    """
    rows: dict[int, dict] = {}
    for record in _read_records(run_dir):
        if record.get("event") == "resume":
            rows = {step: row for step, row in rows.items() if step <= record["step"]}
        elif "metrics" in record:
            row = rows.setdefault(record["step"], {"step": record["step"], "metrics": {}})
            row["time"] = record["time"]
            row["metrics"].update({key: float(value) for key, value in record["metrics"].items()})
    return [rows[step] for step in sorted(rows)]


def read_resume_steps(run_dir: str | Path) -> list[int]:
    """Return the steps at which the run was resumed and whose continuation was not itself abandoned, in order."""
    steps: list[int] = []
    for record in _read_records(run_dir):
        if record.get("event") == "resume":
            steps = [step for step in steps if step < record["step"]] + [record["step"]]
    return steps


def sync(run_dir: str | Path, uri: str | None = None) -> str:
    """Send to MLflow what it has not acknowledged; safe to repeat, and to interrupt.

    Args:
        uri: Another server than the run's own; the whole run is sent to a server that does not know it.

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
    cursor = Cursor.load(run_dir)
    shipper = Shipper(run_dir, resolve_uri(uri, cursor.uri), cursor, threading.Event(), lock_wait_s=15.0)
    shipper.ship()
    if cursor.run_id is None:
        raise ValueError(f"{run_dir / JOURNAL_FILE} does not say how the run began; nothing can be sent")
    return cursor.run_id


def _read_records(run_dir: str | Path) -> Iterator[dict]:
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a run")
    return (record for record, _ in read_lines(path))


def _now() -> float:
    return round(time.time(), 3)


def _encode(value: float) -> float | str:
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _set_aside(run_dir: Path) -> None:
    """Keep what an earlier run left in this folder under other names, so that a fresh start does not mix with it."""
    metrics, tracking = run_dir / METRICS_FILE, (run_dir / JOURNAL_FILE).parent
    if not (metrics.exists() or tracking.exists()):
        return
    n = 1
    while (old_metrics := run_dir / f"metrics.{n}.jsonl").exists() or (run_dir / f"tracking.{n}").exists():
        n += 1
    if metrics.exists():
        move(metrics, old_metrics)
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
        run_id = sync(options.run_dir, options.uri)
    except Exception as error:  # MLflow raises its own
        raise ValueError(scrub(str(error))) from error
    print(f"MLflow run {run_id} is complete")
