"""Metrics of a run for those who read their curves in another program: `tracking.also`.

A thread follows `metrics.jsonl`, as the delivery to MLflow does, and hands its rows over; training never waits for it.
Where it stands is in `tracking/also.json`: rows behind that are handed over again by the next process. A row may so
arrive twice, with the same values at the same step, and none is lost. After a resume at step k, rows of later steps
that came before count no more.

Only metrics cross the bridge. Whatever fails here costs one message, and the curves from there on until the next start.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from data_pipeline.disk import move, replacing
from data_pipeline.foreign import Count, read_json
from gptoss_dist.tracking.delivery.requests import one_line
from gptoss_dist.tracking.jsonl import is_line_start, read_lines
from gptoss_dist.tracking.records import (
    JOURNAL_FILE,
    METRICS_FILE,
    MetricsRow,
    Resumed,
    RunStart,
    metrics_record,
    operation,
)

logger = logging.getLogger(__name__)

PLACES_FILE = "tracking/also.json"


class TensorBoard:
    """Event files in the run's folder `tensorboard/`, written with the package tensorboard alone."""

    PACKAGE = "tensorboard"

    def __init__(self, run_dir: Path, *, is_new: bool) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run_dir / "tensorboard"
        if is_new and folder.exists():  # of an earlier run in this folder, as `Tracker` moves its files
            n = 1
            while (old := run_dir / f"tensorboard.{n}").exists():
                n += 1
            move(folder, old)
        self._file = EventFileWriter(str(folder))

    def row(self, row: MetricsRow) -> None:
        """Take the values of a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.metrics.items()]
        self._file.add_event(Event(wall_time=row.time, step=row.step, summary=Summary(value=values)))

    def resume(self, step: int) -> None:
        """Take note that what came before for steps beyond `step` counts no more."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # From this step on, TensorBoard drops what it has read before.
        self._file.add_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def flush(self) -> None:
        """Bring to disk what was taken."""
        self._file.flush()

    def close(self) -> None:
        """Flush and end."""
        self._file.close()


class WeightsAndBiases:
    """A run of W&B, whose history has the step as a column of its own: W&B's own step never goes back."""

    PACKAGE = "wandb"

    def __init__(self, run_dir: Path, *, is_new: bool) -> None:
        import wandb

        start = _first_start(run_dir)
        variables = os.environ
        is_online = variables.get("WANDB_MODE", "online") not in ("offline", "dryrun", "disabled")
        if is_online and not wandb.login(prompt=False, verify=False):
            raise ValueError("nobody is logged in; `wandb login` first, set WANDB_API_KEY, or WANDB_MODE=offline")
        self._run = wandb.init(
            project=variables.get("WANDB_PROJECT") or start.experiment,
            name=variables.get("WANDB_NAME") or start.run_name,
            id=variables.get("WANDB_RUN_ID") or start.uid,
            resume="allow",
            dir=str(run_dir),
            # Only metrics: neither what the terminal shows, nor the code, nor the machine.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def row(self, row: MetricsRow) -> None:
        """Take the values of a step."""
        self._run.log({"step": row.step} | row.metrics)

    def resume(self, step: int) -> None:
        """Do nothing: W&B cannot take back what came before for later steps."""

    def flush(self) -> None:
        """Do nothing: what was taken is in the hands of W&B's own process."""

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()


def _first_start(run_dir: Path) -> RunStart:
    """Return how the run began, as its record says."""
    records = (operation(line) for line, _ in read_lines(run_dir / JOURNAL_FILE))
    start = next((record for record in records if isinstance(record, RunStart)), None)
    if start is None:
        raise ValueError(f"{run_dir / JOURNAL_FILE} does not say how the run began")
    return start


Writer = TensorBoard | WeightsAndBiases
BRIDGES: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
"""Writers by the names that `tracking.also` has."""


def check_bridges(names: Sequence[str]) -> None:
    """Refuse bridges whose packages are not installed.

    Raises:
        ValueError: One is missing.
    """
    for name in names:
        if find_spec(BRIDGES[name].PACKAGE) is None:
            raise ValueError(
                f"tracking.also={name} needs the package {BRIDGES[name].PACKAGE}, which is not installed; install it "
                f"with `sh launch/install.sh --extras {name}`, or leave {name} out"
            )


class Bridges:
    """The thread that hands the rows of a run over.

    Args:
        run_dir: Folder of the run, whose record has begun: `metrics.jsonl` is this run's.
        names: Of `BRIDGES`; without any there is no thread.
        message: What tells the user what goes wrong.
        interval_s: Seconds between two looks at the file.
    """

    def __init__(
        self,
        run_dir: Path,
        names: Sequence[str],
        message: Callable[[str], None] = logger.warning,
        interval_s: float = 5.0,
    ) -> None:
        self._run_dir, self._message, self._interval_s = run_dir, message, interval_s
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._follow, args=(name,), name=f"tracking.also={name}", daemon=True)
            for name in dict.fromkeys(names)
        ]
        self._places = _read_places(run_dir) if self._threads else {}
        for thread in self._threads:
            thread.start()

    def close(self, timeout: float = 30.0) -> None:
        """Hand over what is left, for at most `timeout` seconds; call it when no more rows come."""
        self._closing.set()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                self._message(f"{thread.name}: not everything was taken in {timeout:g} s; metrics.jsonl has all")

    def _follow(self, name: str) -> None:
        """Work as the thread of one bridge."""
        try:
            writer = BRIDGES[name](self._run_dir, is_new=not self._places.get(name))
            is_last = False
            while not is_last:
                is_last = self._closing.wait(self._interval_s)
                self._hand_over(name, writer)
            writer.close()
        except Exception as error:
            ends = "training goes on, and the curves there end until the next start"
            self._message(f"tracking.also={name}: {one_line(error)}; {ends}")

    def _hand_over(self, name: str, writer: Writer) -> None:
        """Hand over the rows that have come, and note how far."""
        place = before = self._places.get(name, 0)
        for line, end in read_lines(self._run_dir / METRICS_FILE, before):
            place = end
            match metrics_record(line):
                case MetricsRow() as row:
                    writer.row(row)
                case Resumed(step=step):
                    writer.resume(step)
        if place == before:
            return
        writer.flush()
        self._places[name] = place
        with replacing(self._run_dir / PLACES_FILE) as temporary:
            temporary.write_text(json.dumps(self._places))


def _read_places(run_dir: Path) -> dict[str, int]:
    """Return how far each bridge has come; from the beginning where that is not known, or does not fit the file."""
    path = run_dir / PLACES_FILE
    if not path.exists():
        return {}
    try:
        places = read_json(path, dict[str, Count], remedy="it is written again")
        return {name: place for name, place in places.items() if is_line_start(run_dir / METRICS_FILE, place)}
    except (OSError, ValueError):
        return {}
