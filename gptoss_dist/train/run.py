"""What is open while a run trains: its loader, report, saver and request to stop, closed in order however it ends."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch.distributed as dist
from torch import Tensor

from data_pipeline import BatchLoader
from gptoss_dist import checkpoint
from gptoss_dist.checkpoint import CheckpointInfo, Retention, Saver, SkippedSamples
from gptoss_dist.checkpoint.formats.pretrained import Pretrained
from gptoss_dist.config import Config
from gptoss_dist.distributed.collectives import all_gather_objects, broadcast_object, on_rank_zero
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.distributed.signals import StopRequest
from gptoss_dist.engine import Engine
from gptoss_dist.engine.non_finite import NonFiniteFinder
from gptoss_dist.parallel.mesh import spanned_machines
from gptoss_dist.tracking.delivery.environment import Wishes
from gptoss_dist.tracking.delivery.system_metrics import NodeMonitor, monitor_this_node
from gptoss_dist.tracking.profiling import profiled
from gptoss_dist.train.changes import changes_of
from gptoss_dist.train.data import RunData, TrainingData, check_length
from gptoss_dist.train.faults import FolderWatch, SkipGuard, Spike, SpikeGuard, StepWatch, TrainingError
from gptoss_dist.train.markers import STOP, StopFile, mark_done, mark_stopped
from gptoss_dist.train.report import LaunchedStep, Report, in_words
from gptoss_dist.train.start import RunLock, Start, earlier_start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewind:
    """Where a run goes on after a spike of the loss."""

    start: Start
    """The checkpoint, as if the run were resumed from it."""
    data: RunData
    """What it reads from then on: the same without the samples that came with the spike."""


@dataclass(frozen=True)
class Setup:
    """What a process has for the whole of a run, however often the run goes back to a checkpoint."""

    config: Config
    ranks: Ranks
    engine: Engine
    group: dist.ProcessGroup
    """A group of all ranks, for the saver alone from now on."""
    stop: StopRequest
    """Whether the run was asked to stop; it is heard also while the run goes back."""
    carried: dict[str, bytes]
    """Files that go into each checkpoint, by name."""
    lock: RunLock
    """What keeps other starts out of the run's folders, on rank 0."""


class Run:
    """A run between its first and its last step, as a context manager. Only rank 0 has a `report`."""

    def __init__(self, setup: Setup, start: Start, data: RunData) -> None:
        """Open all that writes to the run's folder.

        Args:
            setup: What stays the same when the run goes back.
            start: Where it begins.
            data: What it reads from there on.
        """
        config, ranks, engine = setup.config, setup.ranks, setup.engine
        self.config, self.ranks, self.engine, self.data = config, ranks, engine, data
        self.stop, self.carried, self.lock = setup.stop, setup.carried, setup.lock
        self.loader = self._open_loader(start.samples_consumed)
        self.report = Report(config, ranks, engine, data.training, start) if ranks.is_main else None
        keep = config.checkpoint
        self.saver = Saver(
            config.checkpoint_folder,
            keep=Retention(keep.keep, keep.keep_every, keep.keep_best),
            asynchronous=keep.asynchronous,
            group=setup.group,
            check=setup.lock.check,
        )
        self.watch = FolderWatch([config.folder, config.checkpoint_folder] if ranks.is_main else [])
        self.stop_file = StopFile(config.folder)
        self.guard = SkipGuard(config.train.max_skipped_steps, start.skipped_steps)
        self.spikes = SpikeGuard(config.spikes, start.info.recent_losses if start.info else ())
        self.last_saved_step = start.step
        self._status: Literal["FINISHED", "KILLED", "FAILED"] = "FAILED"
        self._node: NodeMonitor | None = None
        self.steps = StepWatch(config, ranks, engine, self.message)

    def _open_loader(self, samples_consumed: int) -> BatchLoader:
        train, data = self.config.train, self.config.data
        return BatchLoader(
            self.data.training.mixture,
            micro_batch_size=train.micro_batch_size,
            accumulation=train.gradient_accumulation,
            rank=self.engine.layout.data_rank(self.ranks.rank),
            world_size=self.engine.layout.data_parallel,
            samples_consumed=samples_consumed,
            skipped=self.data.training.skipped_positions,
            document_mask=data.document_mask,
            prefetch=data.prefetch,
            workers=data.workers,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.steps.close()
        with suppress(Exception):
            self.saver.close()  # what is being written is finished, however the run ends
        self.loader.close()
        if self._node is not None:
            self._node.close()
        if self.report:
            self.report.close(self._status, self._why(exception[1]))

    def _why(self, error: BaseException | None) -> str | None:
        if error is not None:
            return str(error) or type(error).__name__
        return self.stop.reason if self._status == "KILLED" else None

    def monitor_node(self) -> None:
        """Measure this machine, in one process of each. Rank 0's is measured by its tracker."""
        ranks = self.ranks
        if ranks.rank > 0 and ranks.hosts and ranks.hosts.index(ranks.hosts[ranks.rank]) == ranks.rank:
            wishes = Wishes.read(log.debug)
            every_s, host = self.config.tracking.system_metrics_every_s, ranks.hosts[ranks.rank]
            self._node = monitor_this_node(self.config.folder, every_s, wishes, host, log.warning)

    def announce(self, start: Start, weights: Pretrained | None) -> None:
        """Tell the user where the run starts, how it is laid out and what it reads; set later checkpoints aside.

        Args:
            weights: Those that a new run starts from, if not from random ones.
        """
        if not self.report:
            return
        config, engine, message = self.config, self.engine, self.report.message
        if start.checkpoint is not None:
            message(f"resumed {start.checkpoint} at step {start.step}")
            try:
                for line in changes_of(start, config, self.ranks.world_size):
                    message(line)
            except ValueError as error:  # settings of another version; what is resumed was checked before
                message(f"what the run does otherwise than before cannot be told: {error}")
        else:
            message(f"training {config.run.name} in {config.folder}")
        if weights is not None:
            message(f"started from the weights of {weights.folder}")
        samples = self.loader.samples_per_step
        message(f"{self.ranks.world_size} processes, {engine.name}, {engine.layout}; {samples} samples per step")
        self.report.plan(start.samples_consumed, samples)
        if spanned := spanned_machines(engine.layout):
            message(spanned)
        for moved in checkpoint.set_aside(config.checkpoint_folder, after=start.step):
            message(f"a later checkpoint is now {moved}")
        checkpoint.tidy(config.checkpoint_folder, self.saver.keep)  # a kill right after a save may have left more
        checkpoint.write_skipped(config.checkpoint_folder, start.skipped)
        self.report.skipping()

    def message(self, text: str) -> None:
        """Tell the user and log.txt, once for all ranks."""
        if self.report:
            self.report.message(text)

    def profiler(self, step: int) -> AbstractContextManager:
        """Return the profiler on rank 0 for the step that is to be recorded, else a context that does nothing."""
        recorded = self.ranks.is_main and step == self.config.train.profile_step
        return profiled(self.config.folder / "profile", step, self.ranks.device) if recorded else nullcontext()

    def read_back(self, launched: LaunchedStep | None) -> bool:
        """Wait for the result of a step that was launched earlier, and report it.

        Returns:
            Whether any rank was asked to stop.

        Raises:
            TrainingError: Too many steps in a row were skipped.
        """
        if launched is None:
            return False
        step, result = launched.step, launched.result.wait()
        loss = float(result.loss)
        self.guard.observe(step, bool(result.skipped), loss, float(result.grad_norm))
        self.spikes.observe(step, None if result.skipped else loss, launched.samples_consumed)
        if self.report:
            self.report.step(launched, self.guard.total)
        if bool(result.skipped) and self.engine.finder is not None:
            self._report_non_finite(step, self.engine.finder)
        if self.spikes.found is None:
            self.guard.check(step, loss)
        if self.report and self.watch.look():
            self.message(f"{self.watch.lost} was deleted or renamed: saving what there is, and stopping")
            self.stop.request("the run's folder was deleted or renamed")
        if self.report and self.stop_file.requested():
            self.stop.request(f"a file {STOP} in the run's folder")
        if self.lock.suspects_loss:
            self.stop.request("the run's folder was taken over")
        return bool(result.stop)

    def rewind(self) -> Rewind | None:
        """Prepare to go back to a checkpoint, if the last step that was read back completed a spike; collective then.

        When it returns, the disk knows what is skipped from now on. Where there is no checkpoint from before the spike
        the run goes on: what it would go back to, its first weights, is further away than where it is.

        Raises:
            TrainingError: The run has gone back as often as it may, too few samples would be left, or what is skipped
                cannot be written.
        """
        if self.spikes.found is None:
            return None
        with self.steps.doing("checkpoint"):  # one is written to its end, and another is verified
            return self._rewind(self.spikes.found)

    def _rewind(self, spike: Spike) -> Rewind | None:
        config, training = self.config, self.data.training
        with suppress(OSError):
            self.saver.close()
        self.report_failed_saves()
        if (most := config.spikes.max_rewinds) <= len(training.skipped):
            raise TrainingError(
                f"{spike}, after {len(training.skipped)} rewinds (spikes.max_rewinds={most}): inspect the samples "
                f"{spike.samples[0]} to {spike.samples[1] - 1} of the data, lower optim.lr, or allow more rewinds with "
                f"--spikes.max_rewinds {2 * most} --resume auto"
            )
        start = earlier_start(config, training.start_step, spike.first_step - 1 - config.spikes.margin)
        if start is None:
            self.message(
                f"{spike}: there is no checkpoint from {config.spikes.margin} steps or more before it (spikes.margin), "
                "training goes on; save more often with --checkpoint.every, or keep more with --checkpoint.keep"
            )
            self.spikes.forget()
            return None
        training = self._skip(spike, start)
        self._status = "KILLED"
        return Rewind(replace(start, skipped=training.skipped, rewound=True), replace(self.data, training=training))

    def _skip(self, spike: Spike, start: Start) -> TrainingData:
        """Record that the samples of a spike are skipped; return the data without them."""
        training = self.data.training
        entry = SkippedSamples(
            first=max(spike.samples[0], start.samples_consumed),
            end=spike.samples[1] + self.config.spikes.after * self.loader.samples_per_step,
            order=training.order_id,
            step=spike.first_step,
            rewound_to=start.step,
            reason=str(spike),
        )
        training = replace(training, skipped=(*training.skipped, entry))
        self._check_owner()
        try:
            check_length(training, start, self.config.train.steps, self.loader.samples_per_step)
            on_rank_zero(lambda: checkpoint.write_skipped(self.config.checkpoint_folder, training.skipped))
        except (ValueError, OSError) as error:
            raise TrainingError(f"{spike}, and its samples cannot be skipped: {error}") from error
        self.message(in_words(entry))
        if self.report:
            self.report.rewound(entry)
        return training

    def _report_non_finite(self, step: int, finder: NonFiniteFinder) -> None:
        """Name what was not finite first; collective, as all ranks have skipped the step."""
        found = [(found, rank) for rank, found in enumerate(all_gather_objects(finder.first(step))) if found]
        if found:
            first, rank = min(found)
            where = f"the first value that is not finite is {first}, on rank {rank}"
        else:
            where = "every output and gradient was finite: a sum over ranks, or the gradient's norm, is too large"
        self.message(f"step {step} was skipped; {where}")

    def report_failed_saves(self) -> None:
        """Tell the user what went wrong in saving since the last call; training goes on."""
        for failure in self.saver.messages():
            log.error("%s", failure)
            self.message(f"CHECKPOINT FAILED: {failure}")

    def save(self, step: int, validation_loss: float | None = None) -> None:
        """Save a checkpoint of after step `step`; collective.

        Args:
            step: Optimizer steps done.
            validation_loss: That of a validation right before, if there was one.

        Raises:
            TrainingError: A weight or a value of the optimizer is not finite on any rank, or another process has
                taken the run over; nothing is saved.
        """
        self._check_owner()
        state = self.engine.state()
        self._check_finite(step, state)
        info = self._checkpoint_info(step, validation_loss, self.report).to_json() if self.report else {}  # rank 0's
        self.saver.save(step, state, info, extra_files=self._write_extra_files)
        self.last_saved_step = step
        if self.report:
            self.report.saved(step, self.saver.pause_s)

    def _check_owner(self) -> None:
        if lost := broadcast_object(self.lock.lost):
            raise TrainingError(lost)

    def _check_finite(self, step: int, state: dict[str, Tensor]) -> None:
        found = [name for names in all_gather_objects(checkpoint.not_finite(state)) for name in names]
        if found:
            before = f"step {self.last_saved_step} is the last one saved" if self.last_saved_step else "none is saved"
            raise TrainingError(
                f"step {step}: {len(found)} tensors hold values that are not finite ({', '.join(found[:3])}), so this "
                f"step is not saved; {before}: lower optim.lr, or inspect the data"
            )

    def _write_extra_files(self, folder: Path) -> None:
        self.data.training.mixture.tokenizer.save(folder)
        for name, content in self.carried.items():
            (folder / name).write_bytes(content)

    def _checkpoint_info(self, step: int, validation_loss: float | None, report: Report) -> CheckpointInfo:
        consumed = self.loader.samples_consumed
        return CheckpointInfo(
            step=step,
            samples_consumed=consumed,
            config=self.config.to_dict(),
            data=self.data.training.place(consumed),
            tokens=report.throughput.tokens,
            skipped_steps=self.guard.total,
            validation_loss=validation_loss,
            recent_losses=self.spikes.recent,
            mlflow_run_id=report.tracker.run_id,
            code=report.revision,
            layout=f"{self.engine.name}, {self.engine.layout}",
        )

    def finish(self, step: int) -> None:
        """Save what is not saved yet, wait for the disk, and say how the run ended.

        Raises:
            TrainingError: The last checkpoint could not be written, or the run's folder had been deleted or taken over.
        """
        self._check_owner()
        with self.steps.doing("checkpoint"):
            if self.last_saved_step != step:
                self.save(step)
            try:
                self.saver.close()
            except OSError as error:
                raise TrainingError(f"{error}; earlier checkpoints are intact") from error
        if lost := broadcast_object(lambda: self.watch.lost):
            raise TrainingError(
                f"{lost} was deleted or renamed while the run was training; step {step} is saved in "
                f"{self.config.checkpoint_folder}, to go on with --resume auto"
            )
        self._status = "FINISHED" if step >= self.config.train.steps else "KILLED"
        if self.report:
            self._leave_marker(step)
        end, more = ("finished", "") if self._status == "FINISHED" else ("stopped as asked", "; --resume auto goes on")
        self.message(f"{end} at step {step}; checkpoint in {self.config.checkpoint_folder}{more}")

    def _leave_marker(self, step: int) -> None:
        """Write for scripts how the run ended; all is saved, so that a full disk costs no more than that."""
        try:
            if self._status == "FINISHED":
                mark_done(self.config.folder, step)
            else:
                mark_stopped(self.config.folder, step, self.stop.reason)
        except OSError as error:
            self.message(f"how the run ended could not be written for scripts: {error}")
