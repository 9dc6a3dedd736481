"""Which differences between runs are more than noise, in sentences.

Runs that differ in their seed alone are replicas. Where there are some, the noise is the standard deviation between
replicas of the same settings, pooled over all settings: it holds what the seed, the order of the data and the batches
of the moment do. Where there are none it is the standard error of the smoothed losses, which knows the batches only.

The best one is chosen after its loss was seen, and then compared with all others. So that chance alone shows a
difference in at most 5 % of comparisons, each of the K (K - 1) / 2 pairs is judged at 5 % over that number
(Bonferroni).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gptoss_dist.tracking.comparing.equal import TRAIN, EqualTable, place_in_words
from gptoss_dist.tracking.comparing.runs import ComparedRun
from gptoss_dist.tracking.comparing.smoothing import Smoothed, paired_difference

LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """What the losses say about two groups of runs."""

    better: str
    worse: str
    difference: float
    """Loss of the second less that of the first, in nats."""
    half_width: float
    """Of the interval around the difference, for all pairs together."""
    place: str
    """Such as `300k tokens`."""

    @property
    def is_shown(self) -> bool:
        """Whether the difference is more than noise."""
        return self.difference > self.half_width

    def __str__(self) -> str:
        figures = f"{self.difference:.4f} ± {self.half_width:.4f} nats"
        if self.is_shown:
            return f"{self.better} is better than {self.worse} by {figures} at {self.place}."
        return f"No difference shown between {self.better} and {self.worse} at {self.place}: {figures}."


@dataclass(frozen=True)
class Judgement:
    """The verdicts about one metric at one place."""

    metric: str
    verdicts: list[Verdict]
    """The best group against each other one, nearest first."""
    noise: str
    """What the noise is, in a sentence."""
    noise_std: float | None
    """Standard deviation between replicas in nats; None without replicas."""


def judge_training(
    runs: list[ComparedRun], groups: list[list[int]], names: list[str], table: EqualTable
) -> Judgement | None:
    """Compare the smoothed training losses at the last place of a table; None if fewer than two groups got there."""
    losses = [row[-1] for row in table.train]
    place, half = table.places[-1], table.half_widths[-1]
    known = [[i for i in group if losses[i].is_known] for group in groups]
    pairs_noise = _replica_noise([[losses[i].value for i in group] for group in known])

    def difference(first: int, second: int) -> Smoothed:
        """Return second less first of two single runs, and its error."""
        a, b = losses[first], losses[second]
        curves = [runs[index].curve(TRAIN, table.axis) for index in (second, first)]
        if paired := paired_difference(curves[0], curves[1], place, half):
            return paired
        variance = a.error**2 + b.error**2
        parts = a.error**4 / a.freedom + b.error**4 / b.freedom
        return Smoothed(b.value - a.value, math.sqrt(variance), variance**2 / parts if parts else math.inf, 0)

    kept = [(group, name) for group, name in zip(known, names) if group]
    if len(kept) < 2:
        return None
    means = [float(np.mean([losses[i].value for i in group])) for group, _ in kept]
    best = int(np.argmin(means))
    level = LEVEL / (len(kept) * (len(kept) - 1) / 2)
    verdicts = []
    for index, (group, name) in enumerate(kept):
        if index == best:
            continue
        if pairs_noise is None:
            found = difference(kept[best][0][0], group[0])
            gap, error, freedom = found.value, found.error, found.freedom
        else:
            gap, freedom = means[index] - means[best], pairs_noise[1]
            error = pairs_noise[0] * math.sqrt(1 / len(group) + 1 / len(kept[best][0]))
        width = t_quantile(1 - level / 2, freedom) * error
        verdicts.append(Verdict(kept[best][1], name, gap, width, place_in_words(table.axis, place)))
    verdicts.sort(key=lambda verdict: verdict.difference)
    std = pairs_noise[0] if pairs_noise else None
    return Judgement(TRAIN, verdicts, _noise_in_words(known, pairs_noise, len(kept)), std)


def judge_validation(groups: list[list[int]], names: list[str], table: EqualTable, metric: str) -> Judgement | None:
    """Compare validation losses at the last place of a table; None without replicas, which alone show their noise."""
    values = [row[-1] for row in table.validation.get(metric, [])]
    known = [[i for i in group if values and math.isfinite(values[i])] for group in groups]
    noise = _replica_noise([[values[i] for i in group] for group in known])
    kept = [(group, name) for group, name in zip(known, names) if group]
    if noise is None or len(kept) < 2:
        return None
    means = [float(np.mean([values[i] for i in group])) for group, _ in kept]
    best = int(np.argmin(means))
    quantile = t_quantile(1 - LEVEL / (len(kept) * (len(kept) - 1)), noise[1])
    place = place_in_words(table.axis, table.places[-1])
    verdicts = [
        Verdict(
            kept[best][1],
            name,
            means[index] - means[best],
            quantile * noise[0] * math.sqrt(1 / len(group) + 1 / len(kept[best][0])),
            place,
        )
        for index, (group, name) in enumerate(kept)
        if index != best
    ]
    verdicts.sort(key=lambda verdict: verdict.difference)
    return Judgement(metric, verdicts, _noise_in_words(known, noise, len(kept)), noise[0])


def sentences(judgement: Judgement, most: int = 8) -> list[str]:
    """Return the verdicts in words; of many, those that are within the noise share a sentence."""
    verdicts = judgement.verdicts
    if len(verdicts) <= most:
        return [str(verdict) for verdict in verdicts]
    within = [verdict for verdict in verdicts if not verdict.is_shown]
    beyond = [verdict for verdict in verdicts if verdict.is_shown]
    first = verdicts[0]
    found = [f"{first.better} has the lowest loss at {first.place}."]
    if within:
        found.append(f"No difference shown between it and {_some([verdict.worse for verdict in within], most)}.")
    if beyond:
        nearest = beyond[0]
        found.append(f"It is better than {_some([verdict.worse for verdict in beyond], most)}; the nearest of these: ")
        found[-1] += f"{nearest.worse}, by {nearest.difference:.4f} ± {nearest.half_width:.4f} nats."
    return found


def t_quantile(probability: float, freedom: float) -> float:
    """Return a quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(min(freedom, 1e6), probability))


def _replica_noise(groups: list[list[float]]) -> tuple[float, int] | None:
    """Return the pooled standard deviation within the groups, and its degrees of freedom; None without replicas."""
    freedom = sum(len(group) - 1 for group in groups if len(group) > 1)
    if not freedom:
        return None
    squares = sum(float(((np.array(group) - np.mean(group)) ** 2).sum()) for group in groups if len(group) > 1)
    return math.sqrt(squares / freedom), freedom


def _noise_in_words(groups: list[list[int]], noise: tuple[float, int] | None, kept: int) -> str:
    pairs = kept * (kept - 1) // 2
    interval = f"± is a 95 % interval{f' for all {pairs} pairs together (Bonferroni)' if pairs > 1 else ''}."
    if noise is None:
        return (
            f"{interval} The noise is the standard error within the runs: how much the losses of single batches "
            "scatter around the smoothed curves. It does not contain what another seed would change, which can be "
            "more; runs that differ in run.seed alone would show it."
        )
    several = [group for group in groups if len(group) > 1]
    return (
        f"{interval} The noise is the standard deviation between runs that differ in run.seed alone, {noise[0]:.4f} "
        f"nats: n = {sum(map(len, several))} runs of {len(several)} "
        f"{'configuration' if len(several) == 1 else 'configurations'}, {noise[1]} degrees of freedom"
        + ("; settings with one run are taken to be as noisy." if len(several) < kept else ".")
    )


def _some(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
