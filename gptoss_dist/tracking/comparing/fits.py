"""Power laws of loss against compute, fitted over the runs of a sweep, with what they predict for a larger budget.

    L(C) = E + A * C^-alpha        C in exaFLOPs, L in nats, E >= 0, A > 0

One point is one run: its smoothed loss at its end, over the compute it took. Its deviations from the law are taken to
be independent, normal and of one size. For given alpha the law is a line, whose least sum of squares is known in
closed form; the least one over alpha is the fit. Intervals are profiles: all values that some law can
have whose sum of squares is at most the least one times 1 + t^2 / (n - 3). Unlike a covariance at the best fit these
are not symmetric, and honest where E and alpha cannot be told apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gptoss_dist.tracking.comparing.equal import TRAIN
from gptoss_dist.tracking.comparing.runs import ComparedRun
from gptoss_dist.tracking.comparing.smoothing import smooth, value_at, window
from gptoss_dist.tracking.comparing.verdicts import t_quantile

FEWEST_POINTS = 5
NARROWEST = 4.0
"""The largest compute over the smallest."""
CONFIDENCE = 0.95
_EXPONENTS = (0.005, 3.0)
"""Of the laws that are tried."""
_COARSE, _FINE = 600, 41


@dataclass(frozen=True)
class Interval:
    """A value and where it lies with the confidence of the fit."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A law, and how well it is known."""

    names: list[str]
    """Of the runs that it was fitted to."""
    compute: np.ndarray
    """float64 [n], exaFLOPs."""
    loss: np.ndarray
    """float64 [n], nats."""
    floor: Interval
    """E."""
    factor: float
    """A."""
    exponent: Interval
    """alpha."""
    residual_std: float
    """Nats."""
    _grid: _Grid

    def predict(self, compute: float) -> Interval:
        """Return the loss of the law at a compute in exaFLOPs; a run deviates from it, see `predict_run`."""
        value = self.floor.value + self.factor * compute**-self.exponent.value
        return self._grid.interval(compute, value)

    def predict_run(self, compute: float) -> Interval:
        """Return the loss of one more run at a compute in exaFLOPs: the law's, and around it what runs deviate by."""
        law = self.predict(compute)
        own = t_quantile((1 + CONFIDENCE) / 2, len(self.loss) - 3) * self.residual_std
        return Interval(
            law.value,
            law.value - math.hypot(law.value - law.low, own),
            law.value + math.hypot(law.high - law.value, own),
        )


@dataclass(frozen=True)
class _Grid:
    """Laws on a grid: their sums of squares and their freedom in A."""

    alpha: np.ndarray
    """float64 [a, 1]."""
    floor: np.ndarray
    """float64 [a, e], for each alpha those within the limit."""
    factor: np.ndarray
    """float64 [a, e]."""
    squares: np.ndarray
    """float64 [a, e]."""
    basis: np.ndarray
    """float64 [a, 1], the sum of squares of (C / unit)^-alpha."""
    unit: float
    limit: float
    """The most that the sum of squares of a law in the interval is."""

    def interval(self, compute: float, value: float) -> Interval:
        """Return the values of all laws within the limit at a compute."""
        place = (compute / self.unit) ** -self.alpha
        slack = np.sqrt(np.maximum(self.limit - self.squares, 0) / self.basis) * place
        inside = self.squares <= self.limit
        middle = self.floor + self.factor * place
        low = np.maximum(middle - slack, self.floor)  # A > 0
        return Interval(value, float(low[inside].min()), float((middle + slack)[inside].max()))


def fit_law(names: list[str], compute: np.ndarray, loss: np.ndarray) -> Fit:
    """Fit the law to points.

    Args:
        names: Of the runs.
        compute: float64 [n], exaFLOPs.
        loss: float64 [n], nats.

    Raises:
        ValueError: There are too few points, or too narrow ones, or losses do not fall with compute.
    """
    compute, loss = np.asarray(compute, float), np.asarray(loss, float)
    check_compute(compute)
    unit = math.exp(float(np.log(compute).mean()))
    alpha = np.geomspace(*_EXPONENTS, _COARSE)
    squares = _lines(alpha, compute / unit, loss).squares
    for _ in range(3):  # ever finer around the best one
        best = int(np.argmin(squares))
        alpha = np.linspace(alpha[max(best - 2, 0)], alpha[min(best + 2, len(alpha) - 1)], _COARSE)
        squares = _lines(alpha, compute / unit, loss).squares
    exponent = float(alpha[int(np.argmin(squares))])
    line = _lines(np.array([exponent]), compute / unit, loss)
    floor, factor, least = float(line.floor[0]), float(line.factor[0]), float(line.squares[0])
    if factor <= 0:
        raise ValueError("no power law is fitted: the losses do not fall with compute")
    freedom = len(compute) - 3
    limit = least * (1 + t_quantile((1 + CONFIDENCE) / 2, freedom) ** 2 / freedom) + 1e-24
    grid = _grid_within(limit, exponent, unit, compute, loss)
    return Fit(
        names,
        compute,
        loss,
        Interval(floor, float(grid.floor.min()), float(grid.floor.max())),
        factor * unit**exponent,
        Interval(exponent, float(grid.alpha.min()), float(grid.alpha.max())),
        math.sqrt(least / freedom),
        grid,
    )


def check_compute(compute: np.ndarray) -> None:
    """Check that there are enough points for a law, and that they are wide enough.

    Args:
        compute: float64 [n], exaFLOPs.

    Raises:
        ValueError: There are not, or they are not.
    """
    levels = len(np.unique(np.round(np.log(compute), 3))) if len(compute) else 0
    if len(compute) < FEWEST_POINTS or levels < 4:
        raise ValueError(
            f"no power law is fitted: it takes {FEWEST_POINTS} runs or more that took 4 different amounts of compute, "
            f"and there are {len(compute)} that took {levels}"
        )
    if compute.max() < NARROWEST * compute.min():
        raise ValueError(
            f"no power law is fitted: the largest compute is {compute.max() / compute.min():.3g} times the smallest, "
            f"and below {NARROWEST:g} times a law cannot be told from a line"
        )


@dataclass(frozen=True)
class _Lines:
    """For each of a exponents the best E >= 0 and A >= 0, all float64 [a]."""

    floor: np.ndarray
    factor: np.ndarray
    squares: np.ndarray
    free_floor: np.ndarray
    """E without its limit."""
    free_squares: np.ndarray
    floor_variance: np.ndarray
    """Of `free_floor`, over that of a loss."""


def _lines(alpha: np.ndarray, compute: np.ndarray, loss: np.ndarray) -> _Lines:
    power = compute[None, :] ** -alpha[:, None]
    count, total, square = len(loss), power.sum(axis=1), (power**2).sum(axis=1)
    determinant = count * square - total**2
    cross = power @ loss
    free_floor = (square * loss.sum() - total * cross) / determinant
    free_factor = (count * cross - total * loss.sum()) / determinant
    # At a limit: through zero if E would be below it, flat if the losses rise.
    factor = np.where(free_factor < 0, 0.0, np.where(free_floor < 0, cross / square, free_factor))
    floor = np.where(free_factor < 0, loss.mean(), np.maximum(free_floor, 0.0))

    def squares(floor: np.ndarray, factor: np.ndarray) -> np.ndarray:
        return ((loss[None, :] - floor[:, None] - factor[:, None] * power) ** 2).sum(axis=1)

    free = squares(free_floor, free_factor)
    return _Lines(floor, factor, squares(floor, factor), free_floor, free, square / determinant)


def _grid_within(limit: float, exponent: float, unit: float, compute: np.ndarray, loss: np.ndarray) -> _Grid:
    """Return the laws whose sum of squares is within the limit."""
    wide = np.unique(np.append(np.geomspace(*_EXPONENTS, _COARSE), exponent))
    inside = np.flatnonzero(_lines(wide, compute / unit, loss).squares <= limit)
    ends = wide[max(inside[0] - 1, 0)], wide[min(inside[-1] + 1, len(wide) - 1)]
    alpha = np.unique(np.append(np.linspace(*ends, _COARSE), exponent))
    lines = _lines(alpha, compute / unit, loss)
    keep = lines.squares <= limit
    alpha = alpha[keep]
    reach = np.sqrt(np.maximum(limit - lines.free_squares[keep], 0) * lines.floor_variance[keep])
    middle = lines.free_floor[keep]
    shares = np.linspace(0.0, 1.0, _FINE)[None, :]
    low, high = np.maximum(middle - reach, 0.0)[:, None], np.maximum(middle + reach, 0.0)[:, None]
    floor = low + shares * (high - low)  # [a, e]
    power = (compute / unit)[None, :] ** -alpha[:, None]
    basis = (power**2).sum(axis=1, keepdims=True)
    above = loss[None, None, :] - floor[:, :, None]
    cross = (power[:, None, :] * above).sum(axis=2)
    factor = np.maximum(cross / basis, 0.0)
    squares = ((above - factor[:, :, None] * power[:, None, :]) ** 2).sum(axis=2)
    return _Grid(alpha[:, None], floor, factor, squares, basis, unit, limit * (1 + 1e-9))


def final_points(runs: list[ComparedRun], only_best: bool) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the points that a law is fitted to: each run's smoothed loss at its end, over its compute.

    Args:
        runs: The runs of a sweep.
        only_best: Leave out a run whose last loss another run had with at most as much compute: the envelope.

    Returns:
        Names, exaFLOPs [n] and losses [n], in order of compute.

    Raises:
        ValueError: They are too few or too narrow; where only the envelope is, that is said.
    """
    curves = [(run, *run.curve(TRAIN, "exaflops")) for run in runs]
    curves = sorted(((run, x, y) for run, x, y in curves if len(x) and x[-1] > 0), key=lambda item: float(item[1][-1]))
    check_compute(np.array([x[-1] for _, x, _ in curves]))  # before many runs are compared with each other
    points, beaten = [], 0
    for run, x, y in curves:
        end = float(x[-1])
        loss = smooth(x, y, end, window([x], end))
        if not loss.is_known:
            continue
        rivals = [other for other in curves if other[0] is not run and other[1][0] < end] if only_best else []
        ends = [float(other[1][-1]) for other in rivals]
        losses_there = [
            value_at(other[1], other[2], place, window([other[1]], place))
            for other, place in zip(rivals, (min(end, own) for own in ends))
        ]
        if any(other < loss.value for other in losses_there):
            beaten += 1
        else:
            points.append((run.name, end, loss.value))
    names, compute, losses = zip(*points) if points else ((), (), ())
    try:
        check_compute(np.array(compute))
    except ValueError as error:
        more = f"; {beaten} more had cheaper rivals: --fit final takes these too" if beaten else ""
        raise ValueError(f"{error}{more}") from None
    return list(names), np.array(compute, float), np.array(losses, float)
