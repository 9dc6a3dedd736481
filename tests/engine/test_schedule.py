import itertools
import math

import pytest

from gptoss_dist.config import OptimConfig
from gptoss_dist.engine.schedule import learning_rate


def rates(steps: int, **fields) -> list[float]:
    config = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10, **fields)
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_warmup_then_cosine_to_the_floor():
    lr = rates(110)
    assert lr[0] == pytest.approx(1 / 11) and lr[9] == pytest.approx(10 / 11)
    assert lr[10] == pytest.approx(1.0) and lr[109] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 50 / 99))
    assert lr[60] == pytest.approx(middle)
    assert all(a >= b for a, b in itertools.pairwise(lr[10:]))


def test_warmup_stable_decay():
    lr = rates(100, schedule="wsd", decay_steps=20)
    assert set(lr[10:81]) == {1.0}
    assert lr[99] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(lr[80:]))
    assert lr[90] == pytest.approx(0.1 + 0.9 * (1 - math.sqrt(10 / 19)))


def test_constant_and_short_runs():
    assert set(rates(50, schedule="constant")[10:]) == {1.0}
    assert rates(1)[0] == pytest.approx(1 / 11)
    assert learning_rate(10, 11, OptimConfig(lr=1.0, warmup_steps=10)) == pytest.approx(1.0)
