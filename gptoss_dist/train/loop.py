"""The training loop. It knows neither which engine it drives nor how the model is sharded."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext, suppress

import torch

from data_pipeline import BatchLoader, validation_batches
from gptoss_dist import checkpoint
from gptoss_dist.config import Config
from gptoss_dist.distributed import launchers
from gptoss_dist.distributed.collectives import LocalError, long_timeout_group, on_rank_zero
from gptoss_dist.distributed.processes import Ranks, exit_after_error, seed_everything, start
from gptoss_dist.distributed.signals import StopRequest
from gptoss_dist.engine import build_engine, engine_kind
from gptoss_dist.parallel.mesh import spanned_machines
from gptoss_dist.tracking.metrics import StepTimer
from gptoss_dist.tracking.profiling import profiled
from gptoss_dist.train.data import open_training_data, open_validation, verify
from gptoss_dist.train.faults import SkipGuard, TrainingError
from gptoss_dist.train.periodic import write_samples
from gptoss_dist.train.report import Report
from gptoss_dist.train.schedule import learning_rate
from gptoss_dist.train.start import (
    check_folder,
    check_resumable,
    checkpoint_to_resume,
    open_folder,
    print_message,
)

log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Train as `config` says, in every process of the launcher. Returns the exit code: 0, or 2 for a user's mistake."""
    # Without a handler of its own the library would print warnings past the progress bar, on every rank.
    logging.getLogger("gptoss_dist").addHandler(logging.NullHandler())
    try:
        ranks = start()
        config.engine.kind = engine_kind(config)  # what is saved with the run says which it was
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        train(config, ranks)
    except (ValueError, TrainingError) as error:
        log.error("%s", error)
        mistake, alone = str(error), isinstance(error, LocalError)
        exit_after_error(lambda: launchers.report_error_once(mistake, alone=alone))
        return 2 if isinstance(error, ValueError) else 1
    return 0


def train(config: Config, ranks: Ranks) -> None:
    """Train to the last step, or until asked to stop; then save.

    Raises:
        ValueError: settings, data and model do not fit each other.
        TrainingError: too many steps in a row had to be skipped.
    """
    settings = config.train
    samples_per_step = settings.micro_batch_size * settings.gradient_accumulation * ranks.world_size
    path = checkpoint_to_resume(config)
    info = None
    if path is not None:
        info = checkpoint.read_info(path)
        check_resumable(config, path, info)
    data = open_training_data(config, samples_per_step, checkpoint=path, info=info)
    dataset = data.mixture
    validation = open_validation(config, print_message) if config.validation.every else {}
    if path is None and config.init["from"]:
        pretrained = checkpoint.open_pretrained(config.init["from"], message=print_message)
        checkpoint.check_architecture(pretrained, config.model)
    on_rank_zero(lambda: check_folder(config))
    patient = long_timeout_group()
    verify(config, print_message, patient)
    seed_everything(config.run.seed, ranks.rank)
    engine = build_engine(config, ranks)

    first, consumed, skipped, run_id = 0, 0, 0, None
    if path is not None:
        first, consumed, skipped = info["step"], info["samples_consumed"], info["skipped_steps"]
        if path.parent.resolve() == config.checkpoint_folder.resolve():  # else it is another run's
            run_id = info["mlflow_run_id"]
        state = engine.state()
        checkpoint.load_state(path, state)
        engine.load(state)
        if not checkpoint.restore_rng(path, ranks.rank):
            seed_everything(config.run.seed + first, ranks.rank)
    elif config.init["from"]:
        state = engine.state()
        weights = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
        checkpoint.load_into(weights, pretrained)
        engine.load(state)
    loader = BatchLoader(
        dataset,
        micro_batch_size=settings.micro_batch_size,
        accumulation=settings.gradient_accumulation,
        rank=ranks.rank,
        world_size=ranks.world_size,
        samples_consumed=consumed,
        document_mask=config.data.document_mask,
        prefetch=config.data.prefetch,
        workers=config.data.workers,
    )
    on_rank_zero(lambda: open_folder(config))  # only now: a run that is refused writes nothing
    report = None
    if ranks.is_main:
        tokens = info.get("tokens", consumed * config.data.seq_len) if path else 0
        report = Report(config, ranks, engine, data, start=first, tokens=tokens, run_id=run_id)
        report.message(f"resumed {path} at step {first}" if path else f"training {config.run.name} in {config.folder}")
        if config.init["from"] and not path:
            report.message(f"started from the weights of {pretrained.folder}")
        layout = f"{ranks.world_size} processes, {engine.name}, {engine.layout}"
        report.message(f"{layout}; {samples_per_step} samples per step")
        report.plan(consumed, samples_per_step)
        if spanned := spanned_machines(engine.layout):
            report.message(spanned)
        for moved in checkpoint.set_aside(config.checkpoint_folder, after=first):
            report.message(f"a later checkpoint is now {moved}")

    retention = checkpoint.Retention(config.checkpoint.keep, config.checkpoint.keep_every, config.checkpoint.keep_best)
    saver = checkpoint.Saver(
        config.checkpoint_folder, keep=retention, asynchronous=config.checkpoint.asynchronous, group=patient
    )
    timer, stop, guard = StepTimer(ranks.device), StopRequest(), SkipGuard(settings.max_skipped_steps, skipped)

    def every(interval: int, step: int) -> bool:
        return interval > 0 and step % interval == 0

    def read_back(pending) -> bool:
        """Report a step that was launched earlier; true if any rank was asked to stop."""
        if pending is None:
            return False
        step, result, lr, timing, position = pending
        result.wait()
        guard.observe(step, bool(result.skipped), float(result.loss), float(result.grad_norm))
        if report:
            report.step(step, result, lr, timing, guard.total, position)
        guard.check(step, float(result.loss))
        return bool(result.stop)

    def validate(step: int) -> float:
        losses = {}
        for name, split in validation.items():
            batches = validation_batches(
                split,
                micro_batch_size=settings.micro_batch_size,
                rank=ranks.rank,
                world_size=ranks.world_size,
                max_samples=config.validation.samples,
                document_mask=config.data.document_mask,
            )
            losses[name] = engine.evaluate(batches)
        # By the weights that the run began with, so that a curriculum does not move what is compared over time.
        weights = {name: dataset.weights[name] for name in losses}
        if not sum(weights.values()):
            weights = dict.fromkeys(losses, 1.0)
        loss = sum(weights[name] * losses[name] for name in losses) / sum(weights.values())
        if report:
            report.validation(step, loss, losses)
        return loss

    def save(step: int, validation_loss: float | None) -> None:
        info = {
            "samples_consumed": loader.samples_consumed,
            "skipped_steps": guard.total,
            "validation_loss": validation_loss,
            "config": config.to_dict(),
            "data": {"path": config.data.path} | data.place(loader.samples_consumed),
            "tokens": report.throughput.tokens if report else None,
            "mlflow_run_id": report.tracker.run_id if report else None,
            "code": report.revision if report else None,
            "layout": f"{engine.name}, {engine.layout}",
        }
        saver.save(step, engine.state(), info, extra_files=dataset.tokenizer.save)
        if report:
            report.saved(step, saver.pause_s)

    step, pending, saved, status = first, None, first, "FAILED"
    try:
        if validation and first == 0:
            validate(0)
        while step < settings.steps:
            timer.start()
            with timer.phase("data"):
                batches = next(loader)
            lr = learning_rate(step, settings.steps, config.optim)
            recorded = ranks.is_main and step + 1 == settings.profile_step
            with profiled(config.folder / "profile", step + 1, ranks.device) if recorded else nullcontext():
                with timer.phase("compute"):
                    engine.forward_backward(batches)
                with timer.phase("optimizer"):
                    result = engine.update(lr, stop.requested)
            step += 1
            for message in saver.messages():
                log.error("%s", message)
                if report:
                    report.message(f"CHECKPOINT FAILED: {message}")
            # Reading results one step late keeps the device busy meanwhile. It counts into the step's time.
            stopping = read_back(pending)
            pending = (step, result, lr, timer.stop(), loader.samples_consumed)
            last = step == settings.steps
            due = {
                name: last or every(interval, step)
                for name, interval in {
                    "validation": config.validation.every,
                    "samples": config.sampling.every,
                    "checkpoint": config.checkpoint.every,
                }.items()
            }
            if stopping or any(due.values()):
                stopping |= read_back(pending)
                pending = None
            if stopping:
                break
            validation_loss = validate(step) if validation and due["validation"] else None
            if config.sampling.prompts and due["samples"]:
                write_samples(config, ranks, engine, dataset, report, step)
            if due["checkpoint"]:
                save(step, validation_loss)
                saved = step
        if saved != step:
            save(step, None)
        try:
            saver.close()
        except OSError as error:
            raise TrainingError(f"{error}; earlier checkpoints are intact") from error
        status = "FINISHED" if step >= settings.steps else "KILLED"
        if report:
            end = "finished" if status == "FINISHED" else "stopped as asked"
            report.message(f"{end} at step {step}; checkpoint in {config.checkpoint_folder}")
    finally:
        with suppress(Exception):
            saver.close()  # what is being written is finished, however the run ends
        stop.close()
        loader.close()
        if report:
            report.close(status)
