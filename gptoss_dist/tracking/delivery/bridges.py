"""Metrics of a run for those who read their curves in another program: `tracking.also`.

A thread follows `metrics.jsonl`, as the delivery to MLflow does, and hands its rows over; training never waits for it.
Where it stands is in `tracking/also.json`: rows behind that are handed over again by the next process. A row may so
arrive twice, with the same values at the same step. Of TensorBoard none is lost; W&B's own process takes rows without
saying when the disk has them, and what it holds is lost where it is killed too. After a resume at step k, rows of later
steps that came before count no more.

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
from typing import Any

from data_pipeline.disk import move, replacing
from data_pipeline.foreign import Count, read_json
from gptoss_dist.distributed.hosts import this_host
from gptoss_dist.tracking.delivery.requests import one_line
from gptoss_dist.tracking.jsonl import is_line_start, read_lines
from gptoss_dist.tracking.records import (
    JOURNAL_FILE,
    METRICS_FILE,
    MetricsRow,
    Resumed,
    RunStart,
    free_number,
    metrics_record,
    run_starts,
)

logger = logging.getLogger(__name__)

PLACES_FILE = "tracking/also.json"
_WRITING = threading.Lock()
"""Held while that file is written: each bridge has its thread, and changes its own place."""


class TensorBoard:
    """Event files in the run's folder `tensorboard/`, written with the package tensorboard alone."""

    PACKAGE = "tensorboard"

    def __init__(self, run_dir: Path, *, is_new: bool) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run_dir / "tensorboard"
        if is_new and folder.exists():  # of an earlier run in this folder, as `Tracker` moves its files
            move(folder, run_dir / f"tensorboard.{free_number(run_dir, 'tensorboard.{}')}")
        folder.mkdir(exist_ok=True)
        # Readers take the files in the order of their names. The package's own writer has a thread, which prints a
        # traceback where the disk is full.
        name = f"events.out.tfevents.{time.time():017.6f}.{this_host()}.{os.getpid()}"
        self._file = RecordWriter(open(folder / name, "xb"))  # noqa: SIM115 -- lives as long as this
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _write(self, event: Any) -> None:
        self._file.write(event.SerializeToString())

    def row(self, row: MetricsRow) -> None:
        """Take the values of a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.metrics.items()]
        self._write(Event(wall_time=row.time, step=row.step, summary=Summary(value=values)))

    def resume(self, step: int) -> None:
        """Take note that what came before for steps beyond `step` counts no more."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # From this step on, TensorBoard drops what it has read before.
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

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
    if not (starts := run_starts(run_dir)):
        raise ValueError(f"{run_dir / JOURNAL_FILE} does not say how the run began")
    return starts[0]


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
            threading.Thread(
                target=self._follow, args=(name, _threads_of(run_dir, name)), name=_title(run_dir, name), daemon=True
            )
            for name in dict.fromkeys(names)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Hand over what is left without waiting for it; the next bridges of the same run go on after that."""
        self._closing.set()

    def close(self, timeout: float = 30.0) -> None:
        """Hand over what is left, for at most `timeout` seconds; call it when no more rows come."""
        self.stop()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                name = thread.name.partition(" ")[0]
                self._message(f"tracking.also={name}: not everything was taken in {timeout:g} s; metrics.jsonl has all")

    def _follow(self, name: str, earlier: list[threading.Thread]) -> None:
        """Work as the thread of one bridge, after those of the same run before it went back to a checkpoint."""
        try:
            for thread in earlier:
                thread.join()
            known = _read_places(self._run_dir).get(name)
            writer = BRIDGES[name](self._run_dir, is_new=known is None)
            _write_place(self._run_dir, name, place := known or 0)  # from here on, what is in its folder is this run's
            is_last = False
            while not is_last:
                is_last = self._closing.wait(self._interval_s)
                place = self._hand_over(name, writer, place)
            writer.close()
        except Exception as error:
            ends = "training goes on, and the curves there end until the next start"
            self._message(f"tracking.also={name}: {one_line(error)}; {ends}")

    def _hand_over(self, name: str, writer: Writer, before: int) -> int:
        """Hand over the rows that have come, note how far, and return it."""
        place = before
        for line, end in read_lines(self._run_dir / METRICS_FILE, before):
            place = end
            match metrics_record(line):
                case MetricsRow() as row:
                    writer.row(row)
                case Resumed(step=step):
                    writer.resume(step)
        if place != before:
            writer.flush()
            _write_place(self._run_dir, name, place)
        return place


def _title(run_dir: Path, name: str) -> str:
    return f"{name} {run_dir.absolute()}"


def _threads_of(run_dir: Path, name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == _title(run_dir, name)]


def _write_place(run_dir: Path, name: str, place: int) -> None:
    with _WRITING, replacing(run_dir / PLACES_FILE) as temporary:
        temporary.write_text(json.dumps(_read_places(run_dir) | {name: place}))


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
