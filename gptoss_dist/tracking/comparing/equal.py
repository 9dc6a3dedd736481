"""Losses of several runs at equal tokens, equal FLOPs and equal hours."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from gptoss_dist.tracking.comparing.runs import AXES, ComparedRun
from gptoss_dist.tracking.comparing.smoothing import UNKNOWN, Smoothed, smooth, window
from gptoss_dist.tracking.recorded.columns import is_validation

TRAIN = "loss/train"
_SHARES = (0.25, 0.5, 1.0)
_FAR_SHORTER = 0.5
"""A run that got less far than this share of the median run does not say where the others are compared."""
_MUCH_FURTHER = 1.1
_MOST_NAMED = 5
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_UNIT_OF = {"tokens": "tokens", "exaflops": "exaFLOPs", "hours": "h", "steps": "steps"}


@dataclass(frozen=True)
class EqualTable:
    """Losses at places on one axis. Shapes: R runs, P places."""

    axis: str
    """A name of `AXES`."""
    places: list[float]
    """[P], in order."""
    half_widths: list[float]
    """[P], of the windows in which training losses were smoothed."""
    train: list[list[Smoothed]]
    """[R][P]."""
    validation: dict[str, list[list[float]]]
    """[R][P] by metric, between two validations; NaN where that would be beyond the first or the last one."""
    ends: list[float]
    """[R], where each run's finite training losses end; NaN without any."""
    left_out: list[int]
    """Runs that have no loss on this axis, or ended before the last place without having a say in where that is."""
    limiting: int | None
    """The run that says where the last place is, if others went on for at least a tenth more."""

    @property
    def words(self) -> str:
        """The axis in words."""
        return AXES[self.axis]

    def notes(self, names: list[str], statuses: list[str], *, is_first: bool) -> list[str]:
        """Return sentences about the runs that say how far losses are compared, and about those that do not.

        Args:
            names: Of the runs.
            statuses: Of the runs.
            is_first: Whether no table before has said it. On further axes it is no news that runs end in other places.
        """

        def ended(run: int) -> str:
            if math.isnan(self.ends[run]):
                return f"{names[run]} (no loss there)"
            end = place_in_words(self.axis, self.ends[run])
            return f"{names[run]} ({statuses[run].lower()}, its losses end at {end})"

        found = []
        if self.left_out and is_first:
            named = ", ".join(map(ended, self.left_out[:_MOST_NAMED]))
            more = f" and {len(self.left_out) - _MOST_NAMED} more" if len(self.left_out) > _MOST_NAMED else ""
            found.append(f"The others are compared beyond these, which got less far in {self.words}: {named}{more}.")
        if self.limiting is not None and is_first:
            found.append(f"Losses are compared up to where {ended(self.limiting)} got in {self.words}; others went on.")
        return found


def equal_table(runs: list[ComparedRun], axis: str, asked: list[float]) -> EqualTable | None:
    """Return the losses of all runs at the places asked for, and at shares of what all have reached.

    Args:
        runs: The R runs. Those for which the axis is not known have no loss anywhere.
        axis: A name of `AXES`.
        asked: Places that a person wants; without one 1/4, 1/2 and all of the least that a run reached. A run that got
            less than half as far as the median run has no say in that: it crashed, or diverged.

    Returns:
        The table; None if fewer than two runs know the axis.
    """
    curves = [run.curve(TRAIN, axis) for run in runs]
    ends = [float(x[-1]) if len(x) else math.nan for x, _ in curves]
    known = [run for run, end in enumerate(ends) if math.isfinite(end)]
    if len(known) < min(2, len(runs)):
        return None
    kept = _with_a_say(known, [run.at_most("tokens") for run in runs], ends)
    limiting = min(kept, key=lambda run: ends[run])
    places = sorted(set(asked)) or [share * ends[limiting] for share in _SHARES]
    places = [place for place in places if place > 0]
    half_widths = [window([x for x, _ in curves], place) for place in places]
    train = [
        [smooth(x, y, place, half) if len(x) else UNKNOWN for place, half in zip(places, half_widths)]
        for x, y in curves
    ]
    names = sorted({name for run in runs for name in run.series if is_validation(name)})
    validation = {
        name: [[between(*run.curve(name, axis), place) for place in places] for run in runs] for name in names
    }
    reach = -math.inf if asked else ends[limiting]
    left_out = [run for run, end in enumerate(ends) if math.isnan(end) or end < reach]
    is_limiting = not asked and max(ends[run] for run in kept) >= _MUCH_FURTHER * ends[limiting]
    return EqualTable(axis, places, half_widths, train, validation, ends, left_out, limiting if is_limiting else None)


def _with_a_say(known: list[int], tokens: list[float], ends: list[float]) -> list[int]:
    """Return the runs that say how far losses are compared: those that got at least half as far as the median run.

    That goes by tokens, where they are known: of runs of the same tokens, one with a small model ends after few FLOPs,
    and one on a fast machine after few hours, and neither is cut short.

    Args:
        known: Runs with losses on the axis, at least one.
        tokens: Where each run ended, in tokens.
        ends: The same on the axis.
    """
    progress = tokens if all(math.isfinite(tokens[run]) for run in known) else ends
    median = sorted(progress[run] for run in known)[(len(known) - 1) // 2]
    return [run for run in known if progress[run] >= _FAR_SHORTER * median]


def between(x: np.ndarray, y: np.ndarray, place: float) -> float:
    """Return the value at a place on the line between the two points around it; NaN beyond the first and the last.

    Args:
        x: float64 [M], in order.
        y: float64 [M].
        place: Where it is wanted.
    """
    slack = 1e-9 * abs(place)
    if not len(x) or not x[0] - slack <= place <= x[-1] + slack:
        return math.nan
    return float(np.interp(place, x, y))


def place_of(text: str) -> float:
    """Return the number that a person means by `300k`, `1.5M`, `2e9` or `300,000`.

    Raises:
        ValueError: It is none, or not more than 0.
    """
    found = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)([kmbgt]?)", text.strip().replace(",", "").replace("_", "").lower())
    try:
        value = float(found[1]) * _UNITS[found[2]] if found else math.nan
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{text!r} is no amount; give a number above 0, such as 300k, 1.5M or 2e9")
    return value


def place_in_words(axis: str, place: float) -> str:
    """Return a place on an axis as a person writes it: `300k tokens`, `0.00123 exaFLOPs`."""
    return f"{amount(place)} {_UNIT_OF[axis]}"


def amount(value: float) -> str:
    """Return a number with at most four digits and a unit: 307200 is 307.2k."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.4g}"
