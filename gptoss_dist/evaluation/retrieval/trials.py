"""Trials: prompts of exactly so many tokens, by context length and depth, and what a model answered."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline import Tokenizer
from data_pipeline.needles.arrange import arrange, least_length, too_short
from data_pipeline.needles.tasks import Episode, make_episode

_Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: intervals of 95 %."""
_SPARE_TOKENS = 4
"""How many more tokens a model may write for each number or name, as it may spell it otherwise."""


@dataclass(frozen=True)
class Place:
    """Where a trial belongs in the table; what its prompt is follows from this alone."""

    length: int
    """Tokens of the prompt."""
    bucket: int
    """Which part of the depths, from 0."""
    trial: int
    """Which one of that bucket, from 0."""


@dataclass(frozen=True)
class Trial:
    """One prompt."""

    place: Place
    episode: Episode
    depth: float
    """Place of the needle among the filler, from 0 (all filler after it) to 1."""
    ids: list[int]
    """The prompt, with its question."""
    answer_tokens: int
    """How many tokens the answer has."""

    @property
    def max_new_tokens(self) -> int:
        """The most tokens that a model may write."""
        return self.answer_tokens + _SPARE_TOKENS * len(self.episode.expected)


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    place: Place
    depth: float
    expected: str
    answered: str
    """What the model wrote."""
    correct: bool


def places(lengths: Sequence[int], buckets: int, trials: int) -> list[Place]:
    """Return the places of all trials, by length, then bucket."""
    return [Place(length, bucket, n) for length in lengths for bucket in range(buckets) for n in range(trials)]


def make_trial(task: str, place: Place, buckets: int, seed: int, tokenizer: Tokenizer) -> Trial:
    """Draw the trial of a place.

    The depth is drawn from the place's bucket: bucket i of n holds the depths from i / n to (i + 1) / n.

    Args:
        task: One of `data_pipeline.needles.tasks.TASKS`.
        place: Where it belongs.
        buckets: How many buckets there are.
        seed: Another seed gives other numbers and depths.
        tokenizer: What makes tokens. Pieces of text that end with a word are encoded one by one, so that a cut never
            changes the tokens before it.

    Raises:
        ValueError: The prompt would be shorter than the task needs.
    """

    def cut(text: str) -> list[int]:
        return tokenizer.encode(text).tolist()

    episode, generator = _episode(task, place, seed)
    depth = (place.bucket + generator.random()) / buckets
    ids = arrange(episode, depth, place.length, cut, generator)
    return Trial(place, episode, depth, ids, len(cut(episode.answer)))


def check_lengths(task: str, places: Sequence[Place], seed: int, tokenizer: Tokenizer) -> None:
    """Check that each trial has room for what it says and asks; the filler is not made for that.

    Args:
        task: That of `make_trial`.
        places: Where the trials belong.
        seed: That of `make_trial`.
        tokenizer: That of `make_trial`.

    Raises:
        ValueError: A length is too short; the message has what the longest of its trials takes.
    """
    least: dict[int, int] = {}
    for place in places:
        episode, _ = _episode(task, place, seed)
        needed = least_length(episode, lambda text: tokenizer.encode(text).tolist())
        least[place.length] = max(needed, least.get(place.length, 0))
    for length, needed in least.items():
        if length < needed:
            raise too_short(task, length, needed)


def _episode(task: str, place: Place, seed: int) -> tuple[Episode, random.Random]:
    """Draw what a trial says and asks; return it with the generator that draws the rest of the trial."""
    generator = random.Random(f"{seed} {task} {place.length} {place.bucket} {place.trial}")
    return make_episode(task, generator), generator


def judge(trial: Trial, answered: str) -> Outcome:
    """Return what became of a trial whose prompt was continued with `answered`."""
    correct = trial.episode.is_answered_by(answered)
    return Outcome(trial.place, trial.depth, trial.episode.answer.strip(), answered, correct)


def batches(trials: Sequence[Trial], batch_tokens: int) -> list[list[Trial]]:
    """Cut trials of one length into batches of at most `batch_tokens` tokens, but at least one trial."""
    size = max(1, batch_tokens // trials[0].place.length) if trials else 1
    return [list(trials[start : start + size]) for start in range(0, len(trials), size)]


def wilson_interval(correct: int, trials: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share (Wilson 1927), which is never empty and stays within [0, 1].

    Args:
        correct: How many of them succeeded.
        trials: How many there were, at least 1.
    """
    share, z2 = correct / trials, _Z * _Z
    centre = share + z2 / (2 * trials)
    half = _Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    low, high = (centre - half) / (1 + z2 / trials), (centre + half) / (1 + z2 / trials)
    # At the ends rounding would leave 1e-17 where the formula has 0 and 1.
    return (0.0 if correct == 0 else low), (1.0 if correct == trials else high)


def accuracy(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the accuracy of some outcomes, one at least.

    Returns:
        `{"trials": n, "accuracy": share, "low": share, "high": share}`, the last two being the ends of its interval.
    """
    correct = sum(outcome.correct for outcome in outcomes)
    low, high = wilson_interval(correct, len(outcomes))
    return {"trials": len(outcomes), "accuracy": correct / len(outcomes), "low": low, "high": high}
