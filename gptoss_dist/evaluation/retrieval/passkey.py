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
from gptoss_dist.checkpoint import step_of
from gptoss_dist.evaluation.options import PasskeyOptions
from gptoss_dist.evaluation.ranks import Share, run_on_ranks
from gptoss_dist.evaluation.results import Result, Subject, print_table, publish, results_folder, subject_of
from gptoss_dist.evaluation.retrieval.heat_map import draw
from gptoss_dist.evaluation.retrieval.scaling import OWN, with_yarn
from gptoss_dist.evaluation.retrieval.trials import (
    Outcome,
    Trial,
    accuracy,
    batches,
    judge,
    make_trial,
    places,
)
from gptoss_dist.inference.session import Session
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.model.generate import generate
from gptoss_dist.model.transformer import GptOss


def evaluate(options: PasskeyOptions) -> int:
    """Do what `options` say, in every process of a launch; return the exit code."""
    return run_on_ranks(partial(_evaluate, options))


def _evaluate(options: PasskeyOptions, share: Share) -> None:
    session = Session.load(options.checkpoint, device=options.device or share.device)
    subject = _subject(options, session)
    folder = results_folder(options, options.task, subject)
    _check_length(options, session)
    outcomes: dict[tuple[str, int], list[Outcome]] = {}
    for yarn in options.yarn:
        for length in options.lengths:
            found = share.gather(_run_trials(session, options, yarn, length, share))
            outcomes[yarn, length] = sorted(found, key=lambda outcome: (outcome.place.bucket, outcome.place.trial))
            if share.is_main:
                _report_progress(yarn, length, found)
    if not share.is_main:
        return
    result = summarize(options, outcomes)
    print_table(result.rows)
    print_line(result.details["chance"]["words"])
    publish(
        result,
        subject,
        folder,
        figures={"heat_map": partial(_draw, options, subject, outcomes)},
        mlflow=options.mlflow,
    )
    print_line(f"results in {folder}")


def _subject(options: PasskeyOptions, session: Session) -> Subject:
    folder = session.folder
    if folder is not None and folder.name.startswith("step_"):
        return subject_of(options.checkpoint, folder, step_of(folder))
    return subject_of(options.checkpoint)


def _check_length(options: PasskeyOptions, session: Session) -> None:
    """Refuse contexts that are too short for the task, and warn of those that the model was not made for."""
    for length in options.lengths:
        make_trial(options.task, places([length], 1, 1)[0], 1, options.seed, session.tokenizer)
    longest, limit = max(options.lengths), session.model.config.max_position_embeddings
    if longest > limit and OWN in options.yarn:
        print_line(
            f"warning: contexts of {longest:,} tokens are longer than the {limit:,} positions that the model was made "
            "for (max_position_embeddings)",
            file=sys.stderr,
        )


def _run_trials(session: Session, options: PasskeyOptions, yarn: str, length: int, share: Share) -> list[Outcome]:
    """Return the outcomes of this process's share of the trials of one length."""
    mine = share.of(places([length], options.depths, options.trials))
    trials = [make_trial(options.task, place, options.depths, options.seed, session.tokenizer) for place in mine]
    spare = max((trial.max_new_tokens for trial in trials), default=0)
    model = with_config(session.model, with_yarn(session.model.config, yarn, length, options.original_length, spare))
    outcomes: list[Outcome] = []
    for batch in batches(trials, options.batch_tokens):
        outcomes += map(judge, batch, answers(model, session.tokenizer, batch))
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
    prompts_BT = torch.tensor([trial.ids for trial in trials], device=model.lm_head.weight.device)
    written_BT = generate(
        model,
        prompts_BT,
        max_new_tokens=max(trial.max_new_tokens for trial in trials),
        temperature=0.0,
        eos_id=tokenizer.eot_id,
        vocab_size=tokenizer.n_vocab,
    )[:, prompts_BT.shape[1] :]
    rows = [row[: row.index(tokenizer.eot_id)] if tokenizer.eot_id in row else row for row in written_BT.tolist()]
    return [tokenizer.decode(row) for row in rows]


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


def _report_progress(yarn: str, length: int, outcomes: list[Outcome]) -> None:
    correct = sum(outcome.correct for outcome in outcomes)
    print_line(f"yarn {yarn}, {length:,} tokens: {correct} of {len(outcomes)}", file=sys.stderr)


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
