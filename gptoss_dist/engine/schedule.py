"""Learning rate as a function of the step."""

from __future__ import annotations

import math

from gptoss_dist.config import OptimConfig


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of a run of `steps`.

    Linear warm-up reaches the peak at step `warmup_steps`; cosine and wsd end at `min_lr_ratio` times the peak at the
    last step. wsd decays as 1 - sqrt (arXiv:2405.18392, the form that article found best).
    """
    warmup = config.warmup(steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    floor = config.min_lr_ratio
    if config.schedule == "cosine":
        progress = _progress(step - warmup, steps - warmup)
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if config.schedule == "wsd" and step >= steps - config.decay_steps:
        progress = _progress(step - (steps - config.decay_steps), config.decay_steps)
        return config.lr * (floor + (1 - floor) * (1 - math.sqrt(progress)))
    return config.lr


def _progress(done: int, length: int) -> float:
    """Return the share of a phase of `length` steps at its step `done`; 1 at its last step."""
    return min(1.0, done / max(1, length - 1))
