"""Which differences between runs are more than noise, in sentences.

Runs that differ in their seed alone are replicas. Where there are some, the noise is the standard deviation between
replicas of the same settings, pooled over all settings: it holds what the seed, the order of the data and the batches
of the moment do. Where all settings were run with the same seeds, runs of one seed are compared with each other, and
the noise is what is left once each seed's own level is taken out. Where there are no replicas it is the standard error
of the smoothed losses, which knows the batches only.

The best one is chosen after its loss was seen, and then compared with all others. So that chance alone shows a
difference in at most 5 % of tables, each of the K (K - 1) / 2 pairs of a table is judged at 5 % over that number
(Bonferroni). A page judges up to four tables of the same runs, each by itself.

Runs of one seed and the same settings are one replica, whose loss is their mean: they share more than replicas do. A
run that has no loss at the place is not in its group's mean, which is then said, as the one that diverged may be the
very thing that its settings did.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from gptoss_dist.tracking.comparing.equal import TRAIN, EqualTable, place_in_words
from gptoss_dist.tracking.comparing.runs import ComparedRun
from gptoss_dist.tracking.comparing.smoothing import Smoothed, paired_difference

LEVEL = 0.05
_MOST_NAMED = 3
_LEAST_LEFT = 3
"""Degrees of freedom from which on seeds' own levels are taken out: with fewer that costs more than it brings."""


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
    without: list[str] = field(default_factory=list)
    """Runs of the two groups that have no loss there, and are in no mean."""

    @property
    def is_shown(self) -> bool:
        """Whether the difference is more than noise."""
        return self.difference > self.half_width

    def __str__(self) -> str:
        figures = f"{self.difference:.4f} ± {self.half_width:.4f} nats"
        without = ""
        if self.without:
            without = f" Not in the means: {_some(self.without, _MOST_NAMED)}, which ended before that or diverged."
        if self.is_shown:
            return f"{self.better} is better than {self.worse} by {figures} at {self.place}.{without}"
        return f"No difference shown between {self.better} and {self.worse} at {self.place}: {figures}.{without}"


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
    missing: list[str] = field(default_factory=list)
    """Groups of which no run has a loss there."""


@dataclass(frozen=True)
class Noise:
    """How much runs of the same settings differ."""

    std: float
    """Standard deviation between replicas, pooled over all settings."""
    freedom: int
    runs: int
    """How many have replicas; those of one seed and the same settings are one."""
    settings: int
    """How many of these there are."""
    left: tuple[float, int] | None = None
    """Where all settings were run with the same seeds: what is left once each seed's own level is taken out, and its
    degrees of freedom."""

    @property
    def used(self) -> tuple[float, int]:
        """The standard deviation that differences are judged by, and its degrees of freedom."""
        return self.left or (self.std, self.freedom)


def judge_training(
    runs: list[ComparedRun], groups: list[list[int]], names: list[str], table: EqualTable
) -> Judgement | None:
    """Compare the smoothed training losses at the last place of a table; None if fewer than two groups got there."""
    losses = [row[-1] for row in table.train]
    place, half = table.places[-1], table.half_widths[-1]

    def difference(first: int, second: int) -> Smoothed:
        """Return second less first of two single runs, and its error."""
        a, b = losses[first], losses[second]
        curves = [runs[index].curve(TRAIN, table.axis) for index in (second, first)]
        if paired := paired_difference(curves[0], curves[1], place, half):
            return paired
        variance = a.error**2 + b.error**2
        parts = a.error**4 / a.freedom + b.error**4 / b.freedom
        return Smoothed(b.value - a.value, math.sqrt(variance), variance**2 / parts if parts else math.inf, 0)

    return _judge(TRAIN, runs, groups, names, [loss.value for loss in losses], table, difference)


def judge_validation(
    runs: list[ComparedRun], groups: list[list[int]], names: list[str], table: EqualTable, metric: str
) -> Judgement | None:
    """Compare validation losses at the last place of a table; None without replicas, which alone show their noise."""
    values = [row[-1] for row in table.validation.get(metric, [])]
    return _judge(metric, runs, groups, names, values, table, None) if values else None


def _judge(
    metric: str,
    runs: list[ComparedRun],
    groups: list[list[int]],
    names: list[str],
    values: list[float],
    table: EqualTable,
    difference: Callable[[int, int], Smoothed] | None,
) -> Judgement | None:
    """Compare the best group with all others, by the noise between replicas, or else by the differences of runs."""
    kept = [_Group(name, group, runs, values) for name, group in zip(names, groups)]
    missing = [group.name for group in kept if not group.known]
    kept = [group for group in kept if group.known]
    noise = replica_noise([group.by_seed for group in kept])
    if len(kept) < 2 or (noise is None and difference is None):
        return None
    best = min(kept, key=lambda group: group.mean)
    pairs = len(kept) * (len(kept) - 1) // 2
    place = place_in_words(table.axis, table.places[-1])
    verdicts = []
    for group in kept:
        if group is best:
            continue
        if noise is not None:
            gap, freedom = group.mean - best.mean, float(noise.used[1])
            error = noise.used[0] * math.sqrt(1 / len(group.by_seed) + 1 / len(best.by_seed))
        elif difference is not None:
            found = difference(best.known[0], group.known[0])
            gap, error, freedom = found.value, found.error, found.freedom
        width = t_quantile(1 - LEVEL / pairs / 2, freedom) * error
        verdicts.append(Verdict(best.name, group.name, gap, width, place, best.without + group.without))
    verdicts.sort(key=lambda verdict: verdict.difference)
    noise_in_words = _noise_in_words(noise, len(kept), f"{metric} at {place}")
    return Judgement(metric, verdicts, noise_in_words, noise.std if noise else None, missing)


class _Group:
    """Runs of the same settings, and their losses at a place."""

    def __init__(self, name: str, group: list[int], runs: list[ComparedRun], values: list[float]) -> None:
        self.name = name
        self.known = [run for run in group if math.isfinite(values[run])]
        self.without = [runs[run].name for run in group if run not in self.known]
        seeds: dict[str, list[float]] = {}
        for run in self.known:
            seeds.setdefault(runs[run].config.get("run.seed", f"run {run}"), []).append(values[run])
        self.by_seed = {seed: float(np.mean(losses)) for seed, losses in seeds.items()}
        """The mean loss of each seed."""
        self.mean = float(np.mean(list(self.by_seed.values()))) if seeds else math.nan


def sentences(judgement: Judgement, most: int = 8) -> list[str]:
    """Return the verdicts in words; of many, those that are within the noise share a sentence."""
    verdicts = judgement.verdicts
    place = verdicts[0].place
    missing = [f"Not judged: {_some(judgement.missing, most)}, without a loss at {place}."] if judgement.missing else []
    if len(verdicts) <= most:
        return [*map(str, verdicts), *missing]
    within = [verdict for verdict in verdicts if not verdict.is_shown]
    beyond = [verdict for verdict in verdicts if verdict.is_shown]
    first = verdicts[0]
    found = [f"{first.better} has the lowest loss at {place}."]
    if within:
        found.append(f"No difference shown between it and {_some([verdict.worse for verdict in within], most)}.")
    if beyond:
        nearest = beyond[0]
        found.append(f"It is better than {_some([verdict.worse for verdict in beyond], most)}; the nearest of these: ")
        found[-1] += f"{nearest.worse}, by {nearest.difference:.4f} ± {nearest.half_width:.4f} nats."
    if without := list(dict.fromkeys(name for verdict in verdicts for name in verdict.without)):
        found.append(f"Not in the means: {_some(without, most)}, which ended before that or diverged.")
    return found + missing


def t_quantile(probability: float, freedom: float) -> float:
    """Return a quantile of Student's t distribution, for a probability above one half.

    Found by Newton's method from the left of it, where the distribution function is concave, so that no step goes too
    far. scipy has it too, but its import takes longer than all the rest.
    """
    if freedom > 1e6:
        return NormalDist().inv_cdf(probability)
    logarithm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi * freedom)
    value = NormalDist().inv_cdf(probability)  # t has the longer tails
    for _ in range(200):
        density = math.exp(logarithm - (freedom + 1) / 2 * math.log1p(value**2 / freedom))
        step = (probability - _t_probability(value, freedom)) / density
        value += step
        if abs(step) < 1e-9 * value:
            break
    return value


def _t_probability(value: float, freedom: float) -> float:
    """Return the probability that t is at most `value`, which is not negative."""
    if value == 0:
        return 0.5
    x, a, b = freedom / (freedom + value**2), freedom / 2, 0.5
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):
        tail = math.exp(logarithm) * _beta_fraction(x, a, b) / a
    else:
        tail = 1 - math.exp(logarithm) * _beta_fraction(1 - x, b, a) / b
    return 1 - tail / 2


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Return the continued fraction of the incomplete beta function, by Lentz's method."""
    c, d = 1.0, 1 / _not_zero(1 - (a + b) * x / (a + 1))
    found = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _not_zero(1 + term * d)
            c = _not_zero(1 + term / c)
            found *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return found


def _not_zero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300


def replica_noise(groups: list[dict[str, float]]) -> Noise | None:
    """Return how much replicas differ; None if there are none.

    Args:
        groups: For each configuration the losses of its runs, by their seeds.
    """
    several = [np.array(list(group.values())) for group in groups if len(group) > 1]
    if not several:
        return None
    freedom = sum(len(group) - 1 for group in several)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in several)
    seeds = sorted(groups[0])
    left = None
    rest = (len(groups) - 1) * (len(seeds) - 1)
    # Decided by which runs there are, and not by their losses: else the smaller of two estimates would be chosen.
    if rest >= _LEAST_LEFT and all(sorted(group) == seeds for group in groups):
        table = np.array([[group[seed] for seed in seeds] for group in groups])
        residuals = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
        left = math.sqrt(float((residuals**2).sum()) / rest), rest
    return Noise(math.sqrt(squares / freedom), freedom, sum(map(len, several)), len(several), left)


def _noise_in_words(noise: Noise | None, kept: int, what: str) -> str:
    pairs = kept * (kept - 1) // 2
    interval = f"± is a 95 % interval{f' for all {pairs} pairs together (Bonferroni)' if pairs > 1 else ''}."
    if noise is None:
        return (
            f"{interval} The noise is the standard error within the runs: how much the losses of single batches "
            "scatter around the smoothed curves. It does not contain what another seed would change, which can be "
            "more; runs that differ in run.seed alone would show it."
        )
    found = (
        f"{interval} The noise is the standard deviation between runs that differ in run.seed alone, for {what} "
        f"{noise.std:.4f} nats: n = {noise.runs} runs of {noise.settings} "
        f"{'configuration' if noise.settings == 1 else 'configurations'}, {noise.freedom} degrees of freedom"
    )
    if noise.left is not None:
        return (
            f"{found}. All were run with the same seeds, so runs of one seed are compared with each other: once each "
            f"seed's own level is taken out, {noise.left[0]:.4f} nats are left, {noise.left[1]} degrees of freedom."
        )
    return found + ("; settings with one run are taken to be as noisy." if noise.settings < kept else ".")


def _some(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
