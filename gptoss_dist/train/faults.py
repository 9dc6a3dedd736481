"""What goes wrong during a run, and what ends it because of that."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import nn

from gptoss_dist.config import Config
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.distributed.watchdog import Limits, Watchdog
from gptoss_dist.engine import Engine
from gptoss_dist.tracking.metrics import StepTimer
from gptoss_dist.tracking.stragglers import OwnTime, Stragglers

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message is for the user, and checkpoints are intact."""


class FolderWatch:
    """A watch over folders that a run writes to, which somebody may delete or rename while it trains."""

    def __init__(self, folders: Iterable[Path], interval_s: float = 5.0) -> None:
        self._inodes = {folder: _inode(folder) for folder in folders}
        self._interval_s, self._next = interval_s, 0.0
        self.lost: Path | None = None
        """The folder that is gone, once one is."""

    def look(self) -> bool:
        """Return whether a folder is found to be gone; True once at most, and no more often than the interval asks."""
        if self.lost is not None or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self._interval_s
        with contextlib.suppress(OSError):
            self.lost = next((folder for folder, inode in self._inodes.items() if _inode(folder) != inode), None)
        return self.lost is not None


def _inode(folder: Path) -> tuple[int, int] | None:
    """Return what identifies a folder, or None if it is gone.

    Raises:
        OSError: That cannot be told at the moment.
    """
    try:
        status = os.stat(folder)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):  # the last is NFS's, of what others deleted
            return None
        raise
    return status.st_dev, status.st_ino


class SkipGuard:
    """A count of the steps whose update was skipped, which ends the run after too many in a row."""

    def __init__(self, limit: int, total: int = 0) -> None:
        self.limit, self.total, self.in_a_row = limit, total, 0

    def observe(self, step: int, skipped: bool, loss: float, grad_norm: float) -> None:
        """Note the outcome of a step."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        if skipped:
            log.warning("step %d skipped: loss %s, gradient norm %s", step, loss, grad_norm)

    def check(self, step: int, loss: float) -> None:
        """Raise TrainingError after `limit` skipped steps in a row.

        Args:
            step: The last step, for the message.
            loss: Its loss, for the message.

        Raises:
            TrainingError: The last `limit` steps were all skipped.
        """
        if self.in_a_row >= self.limit:
            raise TrainingError(
                f"{self.in_a_row} steps in a row had a non-finite loss or gradient (last: step {step}, loss {loss}); "
                "the last checkpoint is intact: lower optim.lr, or inspect the data"
            )


class StepWatch:
    """What is known of each step while it runs: its phases are timed, the watchdog hears of them, ranks are compared.

    Args:
        config: The run's settings.
        ranks: The processes of the run.
        engine: The engine, whose blocks tell this rank's own work from waiting for others.
        message: Tells the user something, once for all ranks.
    """

    def __init__(self, config: Config, ranks: Ranks, engine: Engine, message: Callable[[str], None]) -> None:
        settings = config.distributed
        self._timer = StepTimer(ranks.device)
        limits = Limits(
            factor=settings.step_factor,
            floor_s=settings.step_floor,
            first_step_s=settings.first_step_timeout,
            checkpoint_s=settings.checkpoint_timeout,
            evaluation_s=settings.evaluation_timeout,
        )
        self._watchdog = Watchdog(ranks, config.folder, limits)
        self._step, self._measured_step = 0, 0
        self._every = settings.straggler_every if ranks.world_size > 1 else 0
        self._own = OwnTime(_working_alone(engine, config.train.compile) if self._every else [], ranks.device)
        self._stragglers = Stragglers(settings.straggler_factor, message)
        self._finder = engine.finder
        self._compilations: Any = None
        if config.train.compile:
            from torch._dynamo.callback import callback_handler  # takes seconds

            self._compilations = callback_handler
            callback_handler.register_start_callback(self._note_compilation)
        self._watchdog.start()

    def begin(self, step: int) -> None:
        """Note that step `step` begins."""
        self._step = step
        self._timer.start()
        self._watchdog.clock.begin(step)
        if self._finder is not None:
            self._finder.begin(step)
        if self._every and step % self._every == 0:
            self._own.begin()
            self._measured_step = step

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step: `data`, `compute` or `optimizer`."""
        began = time.perf_counter()
        with self._timer.phase(name), self._watchdog.clock.doing(name):
            yield
        if name == "data":
            self._own.add_data(time.perf_counter() - began)

    def end(self) -> dict[str, float]:
        """Note that the step is done, and return its times as metrics."""
        self._own.end()
        timing = self._timer.stop()
        self._watchdog.clock.end()
        if (own_ms := self._own.take()) is not None:
            self._watchdog.publish_time(self._measured_step, own_ms)
        if (beats := self._watchdog.take_times()) is not None:
            timing |= self._stragglers.compare(beats)
        return timing

    def doing(self, what: str) -> AbstractContextManager[None]:
        """Return a context for what is done between steps: `validation`, `checkpoint`, `samples`."""
        return self._watchdog.clock.doing(what)

    def close(self) -> None:
        """End the watch."""
        self._watchdog.close()
        self._own.close()
        if self._compilations is not None:
            self._compilations.remove_start_callback(self._note_compilation)

    def _note_compilation(self, arguments: object) -> None:
        self._watchdog.clock.compiles()


def _working_alone(engine: Engine, compiled: bool) -> list[nn.Module]:
    """Return the modules whose forward pass waits for no other rank, once its weights are gathered.

    With distributed experts that is the attention of a block, which a compiled block does not show.
    """
    if engine.exchange is None:
        return list(engine.model.blocks)
    return [] if compiled else [block.self_attn for block in engine.model.blocks]
