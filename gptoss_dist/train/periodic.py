"""What a run does every so many steps, beside training: validation, checkpoints, samples, evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from data_pipeline import validation_batches
from data_pipeline.printable import first_line
from gptoss_dist.config import Config
from gptoss_dist.evaluation.harness.chat import carried_template
from gptoss_dist.evaluation.harness.in_training import Outcome, TaskEvaluation
from gptoss_dist.evaluation.harness.team import Team
from gptoss_dist.evaluation.tally import mean_by_weight
from gptoss_dist.inference import Sampling, complete
from gptoss_dist.train.run import Run

log = logging.getLogger(__name__)

Findings = dict[str, float]
"""What the tasks of one step found out that later ones of the same step use, by name."""


@dataclass(frozen=True)
class Task:
    """Something that all ranks do together after some steps."""

    name: str
    """What the watch over the steps calls it."""
    every: int
    """Steps between two times; 0 does it after the last step only."""
    do: Callable[[Run, int, Findings], None]

    def is_due(self, step: int, last: int) -> bool:
        """Return whether it is to be done after step `step` of a run that ends with step `last`."""
        return step == last or (self.every > 0 and step % self.every == 0)


def periodic_tasks(config: Config) -> list[Task]:
    """List the tasks of a run, in the order in which those that are due are done.

    A checkpoint comes after the validation, whose loss it records, and before everything that a run could do without.
    """
    tasks = []
    if config.validation.every:
        tasks.append(Task("validation", config.validation.every, validate))
    tasks.append(Task("checkpoint", config.checkpoint.every, save_checkpoint))
    if config.sampling.prompts and config.sampling.every:
        tasks.append(Task("samples", config.sampling.every, write_samples))
    if config.evaluation.every:
        evaluation = TaskEvaluation(config.evaluation)
        tasks.append(Task("evaluation", config.evaluation.every, partial(evaluate_tasks, evaluation)))
    return tasks


def validate(run: Run, step: int, findings: Findings) -> None:
    """Measure the loss on every held-out split; the mean over sources is found as `validation_loss`."""
    losses = {}
    for name, split in run.data.validation.items():
        batches = validation_batches(
            split,
            micro_batch_size=run.config.train.micro_batch_size,
            rank=run.engine.layout.data_rank(run.ranks.rank),
            world_size=run.engine.layout.data_parallel,
            max_samples=run.config.validation.samples,
            document_mask=run.config.data.document_mask,
        )
        losses[name] = run.engine.evaluate(batches)
    # By the weights that the run began with, so that a curriculum does not move what is compared over time.
    loss = mean_by_weight(losses, run.data.training.mixture.weights)
    if run.report:
        run.report.validation(step, loss, losses)
    findings["validation_loss"] = loss


def write_samples(run: Run, step: int, findings: Findings) -> None:
    """Let the model continue the prompts. What goes wrong with that is reported, and the run goes on.

    Only a failure in the middle of a model that several ranks share ends the run: it may be one rank's, for which the
    others wait.
    """
    tokenizer, is_collective = run.data.training.mixture.tokenizer, False
    try:
        prompts = [tokenizer.encode(prompt).tolist() or [tokenizer.eot_id] for prompt in run.config.sampling.prompts]
        is_collective = run.ranks.world_size > 1
        outputs = _continue(run, prompts)
        is_collective = False
        texts = [tokenizer.decode(ids) for ids in outputs]
        if run.report:
            run.report.samples(step, texts)
    except Exception as error:
        if is_collective:
            raise
        log.exception("samples of step %d", step)
        run.message(f"step {step}: no sample, {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def _continue(run: Run, prompts: list[list[int]]) -> list[list[int]]:
    """Return prompts and their continuations; all ranks do, in step, since each holds only a part of the weights."""
    settings = run.config.sampling
    # Compiled blocks would be compiled anew for the cache, the prompt and one token, until the compiler gives up.
    with torch.compiler.set_stance("force_eager"), run.engine.keep_gathered():
        found = complete(
            run.engine.model,
            prompts,
            Sampling(temperature=settings.temperature, top_k=settings.top_k),
            max_new_tokens=settings.max_new_tokens,
            tokenizer=run.data.training.mixture.tokenizer,
            seeds=[run.config.run.seed + number for number in range(len(prompts))],
            compile=False,
        )
    return [ids + one.ids for ids, (one,) in zip(prompts, found)]


def evaluate_tasks(evaluation: TaskEvaluation, run: Run, step: int, findings: Findings) -> None:
    """Run tasks of the harness on the model. What goes wrong is reported, and the run goes on, as with samples.

    Only a failure within a forward pass of a model that several ranks share ends the run.
    """
    tokenizer, ranks = run.data.training.mixture.tokenizer, run.ranks
    run.engine.model.eval()
    team = Team(ranks, run.engine.model, tokenizer, run.config.evaluation.batch_tokens, in_step=ranks.world_size > 1)
    try:
        # As for samples: shapes differ from batch to batch, and compiled blocks would be compiled anew for each.
        with torch.compiler.set_stance("force_eager"), run.engine.keep_gathered():
            outcome = evaluation.measure(team, carried_template(run.carried, tokenizer))
    except Exception as error:
        if ranks.world_size > 1:
            raise
        log.exception("evaluation of step %d", step)
        outcome = Outcome({}, 0.0, first_line(error))
    if run.report and outcome is not None:
        run.report.evaluation(step, outcome.metrics, outcome.seconds, outcome.problem)


def save_checkpoint(run: Run, step: int, findings: Findings) -> None:
    """Save a checkpoint, with the validation loss of this step if there is one."""
    run.save(step, findings.get("validation_loss"))
