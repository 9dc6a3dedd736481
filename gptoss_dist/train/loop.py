"""The training loop. It knows neither which engine it drives nor how the model is sharded.

`run` is a whole training run in one process of a launch, `train` its stations in their order, and `train_steps` the
loop over optimizer steps.
"""

from __future__ import annotations

import logging
import os
from contextlib import closing

import torch

from gptoss_dist.config import Config
from gptoss_dist.distributed.agreement import check_agreement
from gptoss_dist.distributed.collectives import long_timeout_group, on_rank_zero
from gptoss_dist.distributed.processes import Ranks, init_distributed, seed_everything
from gptoss_dist.distributed.signals import StopRequest
from gptoss_dist.engine import build_engine, engine_kind
from gptoss_dist.engine.schedule import learning_rate
from gptoss_dist.evaluation.harness.in_training import check_chat, check_tasks
from gptoss_dist.tracking.delivery.bridges import check_bridges
from gptoss_dist.train.changes import facts_of_start
from gptoss_dist.train.data import check_tokenizer, open_data, verify
from gptoss_dist.train.faults import report_failure
from gptoss_dist.train.objectives import next_token_prediction
from gptoss_dist.train.periodic import Task, periodic_tasks, validate
from gptoss_dist.train.report import LaunchedStep
from gptoss_dist.train.run import Rewind, Run, Setup
from gptoss_dist.train.start import (
    RunLock,
    check_folder,
    engine_settings,
    files_to_carry,
    find_start,
    go_on_after_restart,
    open_folder,
    open_initial_weights,
    print_message,
    record_launch,
    restore,
)


def run(config: Config) -> int:
    """Train as `config` says, in every process of a launch.

    Returns:
        The exit code: 0; 2 after a user's mistake; 1 if training could not go on.
    """
    # Without a handler of its own the library would print warnings past the progress bar, on every rank.
    logging.getLogger("gptoss_dist").addHandler(logging.NullHandler())
    ranks = None
    try:
        ranks = init_distributed(config.distributed.timeout)
        config.engine.kind = engine_kind(config.engine)  # what is saved with the run says which it was
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        train(config, ranks)
    except Exception as error:
        return report_failure(error, ranks)
    return 0


def train(config: Config, ranks: Ranks) -> None:
    """Train to the last step, or until asked to stop; then save.

    A resume takes its place in the run, and what that place says of the data, in `find_start` and `open_data`; weights,
    optimizer state and random generators in `restore`; the loader's position, the counts of tokens and skipped steps
    and the MLflow run in `Run`.

    Raises:
        ValueError: Settings, data and model do not fit each other.
        TrainingError: Too many steps in a row had to be skipped, or the last checkpoint could not be written.
    """
    check_agreement(facts_of_start(config), ranks.hosts)
    with RunLock(config) as lock:
        group = long_timeout_group()
        on_rank_zero(lock.take, group)  # it may watch for a minute whether a former owner lives
        go_on_after_restart(config)
        start = find_start(config)
        data = open_data(config, ranks.world_size, start)
        weights = open_initial_weights(config, start)
        check_tokenizer(config, weights, data)
        carried = files_to_carry(start, weights)
        on_rank_zero(lambda: check_folder(config, start))
        on_rank_zero(lambda: check_tasks(config.evaluation), group)
        on_rank_zero(lambda: check_chat(config.evaluation, data.training.mixture.tokenizer, carried))
        on_rank_zero(lambda: check_bridges(config.tracking.also))
        verify(config.data, print_message, group)
        seed_everything(config.run.seed, ranks.rank)
        engine = build_engine(engine_settings(config), ranks, next_token_prediction)
        restore(engine, start, weights, seed=config.run.seed, rank=ranks.rank)
        on_rank_zero(lambda: open_folder(config, lock), group)  # only now: a run that is refused writes nothing
        with closing(StopRequest()) as stop:
            setup = Setup(config, ranks, engine, group, stop, carried, lock)
            tasks = periodic_tasks(config)
            while True:
                with Run(setup, start, data) as open_run:
                    open_run.announce(start, weights)
                    record_launch(config)
                    open_run.monitor_node()
                    rewind = train_steps(open_run, start.step, tasks)
                if rewind is None:
                    return
                start, data, weights = rewind.start, rewind.data, None
                restore(engine, start, weights, seed=config.run.seed, rank=ranks.rank)


def train_steps(run: Run, step: int, tasks: list[Task]) -> Rewind | None:
    """Train from after step `step` to the last step, or until asked to stop; then save. Do `tasks` when they are due.

    Returns:
        Where the run goes on, if a spike of the loss makes it go back. Nothing is saved then.

    Results are read one step late: reading them waits for the device, which has the next step to work at by then. The
    last one is read before the last checkpoint, a task that is always due after the last step.
    """
    config, engine, steps = run.config, run.engine, run.steps
    last, unread = config.train.steps, None
    if config.validation.every and step == 0:
        with steps.doing("validation"):
            validate(run, 0, {})
    while step < last:
        steps.begin(step + 1)
        with steps.phase("data"):
            batches = next(run.loader)
        lr = learning_rate(step, last, config.optim)
        with run.profiler(step + 1):
            with steps.phase("compute"):
                sums = engine.forward_backward(batches)
            with steps.phase("optimizer"):
                result = engine.update(sums, lr, run.stop.requested)
        step += 1
        run.report_failed_saves()
        stopping = run.read_back(unread)  # it waits for the device, as part of the step that is timed
        unread = LaunchedStep(step, result, lr, steps.end(), run.loader.samples_consumed)
        due = [task for task in tasks if task.is_due(step, last)]
        if stopping or due:
            stopping |= run.read_back(unread)
            unread = None
        if stopping:
            break
        if rewind := run.rewind():
            return rewind
        findings: dict[str, float] = {}
        for task in due:
            with steps.doing(task.name):
                task.do(run, step, findings)
    run.finish(step)
    return None
