"""The verb `passkey`: accuracy of finding a fact, by context length, depth and rotary embedding.

Every process has the whole model and a share of the trials. A trial's prompt depends on seed, task, length, bucket and
number alone, so that all rotary embeddings, models and numbers of processes get the same prompts.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from data_pipeline import Tokenizer
from data_pipeline.command_line import print_line
from data_pipeline.needles.tasks import make_episode
from gptoss_dist.distributed.collectives import all_gather_objects, long_timeout_group
from gptoss_dist.distributed.processes import Ranks
from gptoss_dist.evaluation.options import PasskeyOptions
from gptoss_dist.evaluation.pace import Pace
from gptoss_dist.evaluation.results import Result, Subject, print_table, publish, results_folder
from gptoss_dist.evaluation.retrieval.heat_map import draw
from gptoss_dist.evaluation.retrieval.scaling import OWN, with_yarn
from gptoss_dist.evaluation.retrieval.trials import (
    Outcome,
    Trial,
    accuracy,
    batches,
    check_lengths,
    judge,
    make_trial,
    places,
)
from gptoss_dist.evaluation.subjects import Evaluated, joined, load
from gptoss_dist.inference import Sampling, complete
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.transformer import GptOss


def evaluate(options: PasskeyOptions) -> None:
    """Do what `options` say; in several processes, each has a share of the trials.

    Raises:
        ValueError: There is no such model, or a length is too short for the task.
    """
    with joined(options.device) as ranks:
        evaluated = load(options, ranks)
        _check_length(options, evaluated, ranks)
        with results_folder(options, options.task, evaluated.subject, ranks) as folder:
            outcomes = _outcomes(options, evaluated, ranks)
            if ranks.is_main:
                result = summarize(options, outcomes)
                print_table(result.rows)
                print_line(result.details["chance"]["words"])
                draw_heat_map = partial(_draw, options, evaluated.subject, outcomes)
                publish(result, evaluated.subject, folder, figures={"heat_map": draw_heat_map}, mlflow=options.mlflow)
                print_line(f"results in {folder}")


def _outcomes(options: PasskeyOptions, evaluated: Evaluated, ranks: Ranks) -> dict[tuple[str, int], list[Outcome]]:
    """Return the outcomes of all ranks by rotary embedding and length; collective."""
    group = long_timeout_group() if ranks.world_size > 1 else None
    outcomes: dict[tuple[str, int], list[Outcome]] = {}
    for yarn in options.yarn:
        for length in options.lengths:
            shares = all_gather_objects(_run_trials(evaluated, options, yarn, length, ranks), group)
            found = [outcome for share in shares for outcome in share]
            outcomes[yarn, length] = sorted(found, key=lambda outcome: (outcome.place.bucket, outcome.place.trial))
            if ranks.is_main:
                _report_progress(yarn, length, found)
    return outcomes


def _check_length(options: PasskeyOptions, evaluated: Evaluated, ranks: Ranks) -> None:
    """Refuse contexts that are too short for the task, and warn of those that the model was not made for."""
    trials = places(options.lengths, options.depths, options.trials)
    check_lengths(options.task, trials, options.seed, evaluated.tokenizer)
    if OWN in options.yarn:
        evaluated.warn_of_length(max(options.lengths), ranks)


def _run_trials(evaluated: Evaluated, options: PasskeyOptions, yarn: str, length: int, ranks: Ranks) -> list[Outcome]:
    """Return the outcomes of this process's share of the trials of one length."""
    mine = places([length], options.depths, options.trials)[ranks.rank :: ranks.world_size]
    trials = [make_trial(options.task, place, options.depths, options.seed, evaluated.tokenizer) for place in mine]
    spare = max((trial.max_new_tokens for trial in trials), default=0)
    model = with_config(
        evaluated.model, with_yarn(evaluated.model.config, yarn, length, options.original_length, spare)
    )
    outcomes: list[Outcome] = []
    pace = Pace(ranks.is_main)
    for batch in batches(trials, options.batch_tokens):
        if pace.is_due():
            _report_progress(yarn, length, outcomes, len(trials))
        outcomes += map(judge, batch, answers(model, evaluated.tokenizer, batch))
    return outcomes


def with_config(model: GptOss, config: ModelConfig) -> GptOss:
    """Return a model of another configuration with the same weights, which it shares.

    Args:
        model: Where the weights are.
        config: A configuration that asks for weights of the same shapes.
    """
    with torch.device("meta"):
        twin = GptOss(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie()
    return twin.eval()


def answers(model: GptOss, tokenizer: Tokenizer, trials: Sequence[Trial]) -> list[str]:
    """Return what a model writes after each prompt, always its likeliest token, up to the end of the text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        trials: Trials of one length.
    """
    found = complete(
        model,
        [trial.ids for trial in trials],
        Sampling(temperature=0.0),
        max_new_tokens=max(trial.max_new_tokens for trial in trials),
        stop_ids=[tokenizer.eot_id],
        tokenizer=tokenizer,
        compile=False,  # an answer is a few tokens
    )
    return [completion.text or "" for (completion,) in found]


def summarize(options: PasskeyOptions, outcomes: dict[tuple[str, int], list[Outcome]]) -> Result:
    """Return the table of an evaluation, its metrics, and every outcome.

    Args:
        options: What was asked for.
        outcomes: Those of each rotary embedding and length.
    """
    chance = _chance(options)
    rows, by_depth, metrics = [], [], {}
    for (yarn, length), found in outcomes.items():
        whole = accuracy(found)
        verdict = "at chance" if whole["low"] <= chance["guess"] else "above chance"
        rows.append({"yarn": yarn, "tokens": length, **whole, "verdict": verdict})
        metrics[f"eval/{options.task}/yarn_{yarn}/accuracy_{length}"] = whole["accuracy"]
        for bucket in range(options.depths):
            part = accuracy([outcome for outcome in found if outcome.place.bucket == bucket])
            by_depth.append({"yarn": yarn, "tokens": length, "depth": bucket / options.depths, **part})
    trials = [{"yarn": yarn, **asdict(outcome)} for (yarn, _), found in outcomes.items() for outcome in found]
    return Result(
        options.task,
        asdict(options),
        rows,
        metrics,
        {"chance": chance, "by_depth": by_depth, "outcomes": trials},
    )


def _chance(options: PasskeyOptions) -> dict:
    """Return how often somebody answers rightly who has not read the text, or not the question, and that in words."""
    episode = make_episode(options.task, random.Random(options.seed))
    words = f"chance: 1 in {episode.guesses:,} for a guess"
    if episode.rivals != 1:
        others = f"1 in {episode.rivals}" if episode.rivals else "1 in as many as there are"
        words += f", {others} for one of the answers that the text has to some question"
    return {"guess": 1 / episode.guesses, "one_of_the_text": episode.rivals and 1 / episode.rivals, "words": words}


def _report_progress(yarn: str, length: int, outcomes: list[Outcome], asked: int = 0) -> None:
    correct = sum(outcome.correct for outcome in outcomes)
    left = f", {asked - len(outcomes)} to go in this process" if asked else ""
    print_line(f"yarn {yarn}, {length:,} tokens: {correct} of {len(outcomes)}{left}", file=sys.stderr)


def _draw(options: PasskeyOptions, subject: Subject, outcomes: dict[tuple[str, int], list[Outcome]], figure) -> None:
    panels = {}
    for yarn in options.yarn:
        values = np.zeros((options.depths, len(options.lengths)))
        for column, length in enumerate(options.lengths):
            for outcome in outcomes[yarn, length]:
                values[outcome.place.bucket, column] += outcome.correct / options.trials
        panels[_title(yarn)] = values
    draw(figure, f"{options.task}: {subject.name}", options.lengths, panels)


def _title(yarn: str) -> str:
    factor, _, beta_fast = yarn.partition(":")
    words = {"model": "as trained", "none": "without YaRN", "auto": "YaRN by length"}
    return words.get(factor, f"YaRN, factor {factor}") + (f", beta_fast {beta_fast}" if beta_fast else "")
