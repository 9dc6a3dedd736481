"""What goes wrong during a run, and what ends it because of that."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from data_pipeline.command_line.mistakes import in_words, is_explained, lacks_subject
from gptoss_dist.checkpoint import StepLoss
from gptoss_dist.config import Config, SpikesConfig
from gptoss_dist.distributed import launchers
from gptoss_dist.distributed.collectives import LocalError, is_peer_loss
from gptoss_dist.distributed.heartbeat import SILENT_S, View
from gptoss_dist.distributed.hosts import this_host
from gptoss_dist.distributed.processes import Ranks, exit_after_error, silent_ranks
from gptoss_dist.distributed.watchdog import LOOK_S, Limits, Watchdog
from gptoss_dist.engine import Engine
from gptoss_dist.tracking.live.ranks import RanksRecorder, RankState
from gptoss_dist.tracking.metrics import StepTimer
from gptoss_dist.tracking.stragglers import OwnTime, Stragglers

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message is for the user, and checkpoints are intact."""


PEER_PATIENCE_S = 5.0
"""How long a rank that has lost another waits before it reports that. A launcher ends it sooner."""


def report_failure(error: Exception, ranks: Ranks | None) -> int:
    """Say in one line on each machine why a run has ended; raise an error again that no user could make anything of.

    Args:
        error: What ended the run.
        ranks: This process, if it had met the others.

    Returns:
        The exit code: 2 after a user's mistake, 1 if training could not go on.
    """
    if isinstance(error, RuntimeError) and not isinstance(error, TrainingError) and is_peer_loss(error):
        log.error("a collective failed", exc_info=error)
        _report_lost_peer(error, ranks)
        return 1
    if not is_explained(error) and not isinstance(error, TrainingError):
        raise error
    mistake, alone = in_words(error), isinstance(error, LocalError)
    log.error("%s", mistake, exc_info=error if lacks_subject(error) else None)
    exit_after_error(lambda: launchers.report_error_once(mistake, alone=alone))
    return 2 if isinstance(error, ValueError) else 1


def _report_lost_peer(error: RuntimeError, ranks: Ranks | None) -> None:
    """Say that another process of the run has ended or hangs, and which, as far as that can be told."""
    if ranks:
        silent, advice = silent_ranks(ranks, PEER_PATIENCE_S), ""
    else:
        silent, advice = "", launchers.restart_advice()
        time.sleep(PEER_PATIENCE_S)
    launchers.report_error_once(
        f"rank {os.environ.get('RANK', 0)} on {this_host()} lost another process of the run, which has ended or hangs "
        f"({silent or 'see its message'}): {' '.join(str(error).split())[-400:]}; go on with --resume auto{advice}",
        alone=True,
    )


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


@dataclass(frozen=True)
class Spike:
    """High losses that a run goes back for."""

    first_step: int
    """The first step whose loss was high."""
    last_step: int
    """The step whose loss made it a spike."""
    loss: float
    """The loss of that step in nats; infinite if it was not finite."""
    limit: float
    """The loss above which a step was high."""
    samples: tuple[int, int]
    """The positions that came with it: the first, and the one after the last."""

    def __str__(self) -> str:
        steps = f"step {self.first_step}"
        if self.last_step > self.first_step:
            steps = f"steps {self.first_step} to {self.last_step}"
        return f"the loss rose above {self.limit:.4g} in {steps}, to {self.loss:.4g}"


class SpikeGuard:
    """A look-out for spikes of the loss, the same on all ranks: it sees the loss of the global batch alone.

    What it has in mind is `recent`, which a checkpoint keeps: so a resumed run finds the spikes that the run would have
    found without the interruption.
    """

    LEAST_SPREAD = 0.005
    """Of the median. A loss that hardly moves would otherwise be high for next to nothing."""

    def __init__(self, config: SpikesConfig, recent: Iterable[StepLoss] = ()) -> None:
        """Go on from what another guard had in mind.

        Args:
            config: What a spike is.
            recent: The `recent` of that guard.
        """
        self.config = config
        self.found: Spike | None = None
        """The spike that the last step completed."""
        self._usual: deque[StepLoss] = deque(maxlen=config.window)
        self._high: list[StepLoss] = []
        self._limits: tuple[float, float] | None = None
        for step in recent:
            self.observe(*step)
        self.found = None  # whether it is one, the next step shows

    @property
    def recent(self) -> list[StepLoss]:
        """The steps that the next one is compared with, and after these the high ones since."""
        return [*self._usual, *self._high] if self.config.max_rewinds else []

    def observe(self, step: int, loss: float | None, end: int) -> None:
        """Note the outcome of a step, and whether it makes a spike.

        Args:
            step: The step.
            loss: Its mean token loss in nats. None, for a step that was skipped, and what is not finite are above all
                limits.
            end: The place in the order of the data after it.
        """
        if not self.config.max_rewinds:
            return
        value = loss if loss is not None and math.isfinite(loss) else math.inf
        seen = step, (None if math.isinf(value) else value), end
        high, far = self._limits or self._compute_limits()
        if value > high:
            self._high.append(seen)
        else:
            self._high.clear()
            self._limits = None
            if math.isfinite(value):
                self._usual.append(seen)
        if self._high and (len(self._high) >= self.config.steps or value > far):
            first = self._high[0][0]
            # Further back than this nothing is kept in mind, and `before` is less than that.
            begin = max(place for earlier, _, place in self._usual if earlier < first - self.config.before)
            self.found = Spike(first, step, value, high, (begin, end))

    def forget(self) -> None:
        """Begin anew, as there is nothing to go back to: what the loss is now becomes the usual."""
        self.found, self._limits = None, None
        self._usual.clear()
        self._high.clear()

    def _compute_limits(self) -> tuple[float, float]:
        """Return the loss above which a step is high, and that above which it is a spike by itself."""
        if len(self._usual) < self.config.window:
            return math.inf, math.inf
        losses = np.array([usual for _, usual, _ in self._usual])
        median = float(np.median(losses))
        spread = 1.4826 * float(np.median(np.abs(losses - median)))
        high = median + self.config.deviations * max(spread, self.LEAST_SPREAD * median)
        self._limits = high, max(high, self.config.factor * median)
        return self._limits


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
        self._recorder = RanksRecorder(config.folder, RankStates(self._watchdog.view)) if ranks.is_main else None

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
        if self._recorder is not None:
            self._recorder.close()
        self._watchdog.close()
        self._own.close()
        if self._compilations is not None:
            self._compilations.remove_start_callback(self._note_compilation)

    def _note_compilation(self, arguments: object) -> None:
        self._watchdog.clock.compiles()


_BEHIND_S = LOOK_S + 5.0
"""A rank that is not where another was so long ago is behind: beats are up to `LOOK_S` and 2 s old."""


class RankStates:
    """What all ranks do, for those who watch the run from outside.

    Args:
        view: Returns what rank 0 knows of all ranks.
    """

    def __init__(self, view: Callable[[], View]) -> None:
        self._view = view
        self._counts: dict[int, tuple[int, float]] = {}
        self._first: deque[tuple[float, int]] = deque()
        """When it was seen, and the step of the rank that was furthest then."""

    def __call__(self) -> list[RankState]:
        """Return a state for each rank that was heard of; one whose beats no longer come is silent."""
        now, states, beats = time.monotonic(), [], self._view().beats
        self._first.append((now, max((beat.step for beat in beats.values()), default=0)))
        while len(self._first) > 1 and self._first[1][0] <= now - _BEHIND_S:
            self._first.popleft()
        long_ago, reached = self._first[0]
        for rank, beat in sorted(beats.items()):
            count, since = self._counts.get(rank, (-1, now))
            if beat.count != count:
                since = now
                self._counts[rank] = beat.count, now
            # It is looked at every LOOK_S seconds, and twice before it is called silent. This rank itself is not.
            is_silent = rank != 0 and now - since > 2 * LOOK_S + SILENT_S
            states.append(
                RankState(
                    rank=rank,
                    host=beat.host,
                    step=beat.step,
                    phase=beat.phase,
                    place=beat.place,
                    is_behind=long_ago <= now - _BEHIND_S and beat.step < reached,
                    is_silent=is_silent,
                    measured_step=beat.measured_step,
                    own_ms=beat.own_ms,
                )
            )
        return states


def _working_alone(engine: Engine, compiled: bool) -> list[nn.Module]:
    """Return the modules whose forward pass waits for no other rank, once its weights are gathered.

    With distributed experts that is the attention of a block, with distributed sequences its experts; a compiled block
    shows neither.
    """
    splits_experts, splits_sequences = engine.exchange is not None, engine.layout.context_parallel > 1
    if not splits_experts and not splits_sequences:
        return list(engine.model.blocks)
    if compiled or (splits_experts and splits_sequences):
        return []
    return [block.mlp if splits_sequences else block.self_attn for block in engine.model.blocks]
