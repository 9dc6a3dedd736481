"""What each run came to: its validation losses, speed, stability, balance of experts and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gptoss_dist.config import SpikesConfig
from gptoss_dist.tracking.comparing.equal import TRAIN
from gptoss_dist.tracking.comparing.runs import ComparedRun, number_of
from gptoss_dist.tracking.recorded.columns import is_validation

METRICS = (
    TRAIN,
    "perf/tokens_per_s",
    "perf/mfu",
    "optim/skipped_steps",
    "optim/grad_norm",
    "moe/load_cv",
    "moe/dead_experts",
    "progress/gpu_hours",
)
"""What is read of a run, beside its validation losses."""


LEAST_SPREAD = 0.005
"""Of the median, as in `train/faults.py`, which imports torch."""


@dataclass(frozen=True)
class Validated:
    """The validation losses of one source."""

    metric: str
    best: float
    best_step: int
    last: float
    last_step: int


@dataclass(frozen=True)
class RunSummary:
    """The figures of one run; NaN where nothing was recorded."""

    name: str
    status: str
    steps: int
    validations: list[Validated]
    tokens: float
    exaflops: float
    hours: float
    device_hours: float
    tokens_per_s: float
    """Median."""
    mfu: float
    """Median."""
    spikes: list[int]
    """The first step of each, among the steps that were kept: a run that went back has lost its spike."""
    skipped: float
    grad_norm_median: float
    grad_norm_largest: float
    load_cv: float
    """Mean over the last tenth of the run."""
    dead_experts: float
    """Mean over the last tenth of the run, all layers together."""
    resumes: int
    rewinds: int
    """How often the run went back because of a spike."""


def summarize(run: ComparedRun) -> RunSummary:
    """Return the figures of a run."""
    series = run.series.get(TRAIN)
    losses, rows = (series.values, series.rows) if series else (np.empty(0), np.empty(0, np.int64))
    grad_norms = run.values("optim/grad_norm")
    hours, device_hours = _last(run.axes.get("hours")), _last(run.values("progress/gpu_hours"))
    if math.isnan(device_hours):
        device_hours = hours * number_of(run.tags.get("world_size"))
    return RunSummary(
        name=run.name,
        status=run.status,
        steps=int(run.steps[-1]) if len(run.steps) else 0,
        validations=_validations(run),
        tokens=_last(run.axes.get("tokens")),
        exaflops=_last(run.axes.get("exaflops")),
        hours=hours,
        device_hours=device_hours,
        tokens_per_s=_median(run.values("perf/tokens_per_s")),
        mfu=_median(run.values("perf/mfu")),
        spikes=[int(run.steps[rows[index]]) for index in spikes(losses)],
        skipped=_largest(run.values("optim/skipped_steps")),
        grad_norm_median=_median(grad_norms),
        grad_norm_largest=_largest(grad_norms),
        load_cv=_end(run.values("moe/load_cv")),
        dead_experts=_end(run.values("moe/dead_experts")),
        resumes=sum(event.kind == "resume" for event in run.events),
        rewinds=sum(event.kind == "rewind" for event in run.events),
    )


def spikes(losses: np.ndarray, rule: SpikesConfig | None = None) -> list[int]:
    """Return where spikes of a loss begin, by the rule that a run would go back by (`SpikeGuard`).

    A loss is high if it is above the median of the last 64 losses that were not high by 8 standard deviations, which
    are estimated by the median absolute deviation. Three high ones in a row are a spike, and one above twice the
    median.

    Args:
        losses: float64 [N] in order of steps; what is not finite is high.
        rule: The rule.

    Returns:
        Indices of the first high loss of each.
    """
    rule = rule or SpikesConfig()
    losses = np.where(np.isfinite(losses), losses, np.inf)
    if len(losses) <= rule.window:
        return []
    found: list[int] = []
    free_from = 0
    for index in _candidates(losses, rule):
        if index >= free_from:
            first, free_from = _follow(losses, index, rule)
            found += first
    return found


def _candidates(losses: np.ndarray, rule: SpikesConfig) -> np.ndarray:
    """Return indices of losses that are high beside the `window` losses before them; exact where none of these is.

    A median for each loss would take a minute for a long run. Most are sorted out by what cannot be less: the window of
    a loss lies in three blocks of half its length, so its median is not below the 32nd of these 96 losses in order, and
    half the window does not fit into an interval shorter than the shortest one that holds 32 of the 96.
    """
    half = rule.window // 2
    blocks = -(-len(losses) // half)
    padded = np.concatenate([np.full(2 * half, np.inf), losses, np.full(blocks * half - len(losses), np.inf)])
    around = np.sort(np.lib.stride_tricks.sliding_window_view(padded, 3 * half)[::half], axis=1)  # [blocks, 96]
    least = around[:, half - 1]
    with np.errstate(invalid="ignore"):
        shortest = np.nan_to_num(around[:, half - 1 :] - around[:, : 2 * half + 1], nan=np.inf, posinf=np.inf).min(
            axis=1
        )
    spread = np.maximum(rule.deviations * 1.4826 * shortest / 2, rule.deviations * LEAST_SPREAD * least)
    bound = np.repeat(least + np.where(np.isfinite(spread), spread, 0.0), half)[: len(losses)]
    suspects = np.flatnonzero(losses > bound * (1 - 1e-12))
    suspects = suspects[suspects >= rule.window]
    windows = np.lib.stride_tricks.sliding_window_view(losses, rule.window)  # of index i: windows[i - window]
    high = []
    for start in range(0, len(suspects), 4096):
        part = suspects[start : start + 4096]
        high.append(part[losses[part] > _limits(windows[part - rule.window], rule)[0]])
    return np.concatenate(high) if high else np.empty(0, np.int64)


def _limits(before: np.ndarray, rule: SpikesConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return above what a loss is high, and above what it is a spike by itself, after windows [..., window]."""
    median = np.median(before, axis=-1)
    with np.errstate(invalid="ignore"):  # an infinite one, in a window that is not exact anyway
        spread = 1.4826 * np.median(np.abs(before - median[..., None]), axis=-1)
    high = median + rule.deviations * np.maximum(
        np.nan_to_num(spread, nan=np.inf, posinf=np.inf), LEAST_SPREAD * median
    )
    return high, np.maximum(high, rule.factor * median)


def _follow(losses: np.ndarray, index: int, rule: SpikesConfig) -> tuple[list[int], int]:
    """Go on from a high loss as the guard does, until `window` losses in a row were not high.

    Returns:
        Where spikes begin, and the index from which on no high loss is within the window.
    """
    usual = list(losses[index - rule.window : index])
    found: list[int] = []
    first, limits, calm = -1, _limits(np.array(usual), rule), 0
    while index < len(losses) and calm < rule.window:
        value = losses[index]
        if value > limits[0]:
            first = index if first < 0 else first
            calm = 0
            if (index - first + 1 >= rule.steps or value > limits[1]) and (not found or found[-1] != first):
                found.append(first)
        else:
            usual = [*usual[1:], value]
            first, limits, calm = -1, _limits(np.array(usual), rule), calm + 1
        index += 1
    return found, index


def _validations(run: ComparedRun) -> list[Validated]:
    found = []
    for name in sorted(filter(is_validation, run.series)):
        series = run.series[name]
        finite = np.isfinite(series.values)
        if finite.any():
            values, steps = series.values[finite], run.steps[series.rows[finite]]
            best = int(np.argmin(values))
            found.append(Validated(name, float(values[best]), int(steps[best]), float(values[-1]), int(steps[-1])))
    return found


def _last(values: np.ndarray | None) -> float:
    known = values[np.isfinite(values)] if values is not None else np.empty(0)
    return float(known[-1]) if len(known) else math.nan


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _largest(values: np.ndarray) -> float:
    return float(values.max()) if len(values) else math.nan


def _end(values: np.ndarray) -> float:
    return float(values[-max(1, len(values) // 10) :].mean()) if len(values) else math.nan
