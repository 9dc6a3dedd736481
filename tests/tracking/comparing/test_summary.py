"""What each run came to: spikes by the rule of training, and the other figures."""

import json
import math

import numpy as np
import pytest

from gptoss_dist.config import SpikesConfig
from gptoss_dist.tracking.comparing.reading import read_folder
from gptoss_dist.tracking.comparing.summary import LEAST_SPREAD, spikes, summarize
from gptoss_dist.train.faults import SpikeGuard
from tests.support.recorded_runs import FLOPS_PER_TOKEN, TOKENS_PER_STEP, law, noise, write_run


def spikes_of_the_guard(losses, first=0):
    """What training itself would call spikes, step by step; a spike is counted once however long it lasts."""
    guard, found = SpikeGuard(SpikesConfig(max_rewinds=1)), []
    for step, loss in enumerate(losses, first):
        guard.observe(step, float(loss), 2 * step)
        if guard.found and guard.found.first_step not in found:
            found.append(guard.found.first_step)
        guard.found = None
    return found


def with_spikes(seed):
    random = np.random.default_rng(seed)
    steps = int(random.integers(100, 1500))
    losses = law(4096.0 * np.arange(1, steps + 1)) + noise(steps, random.choice([0.002, 0.02, 0.1]), seed)
    for _ in range(random.integers(0, 6)):
        at, length = int(random.integers(64, steps)), int(random.integers(1, 6))
        losses[at : at + length] += random.choice([0.5, 2.0, 9.0, np.inf, np.nan])
    if seed % 5 == 0:  # it does not come back
        losses[int(random.integers(64, steps)) :] += 3.0
    return losses


@pytest.mark.parametrize("seed", range(25))
def test_spikes_are_those_of_training(seed):
    losses = with_spikes(seed)
    assert spikes(losses) == spikes_of_the_guard(losses)


def test_a_run_that_never_recovers_has_one_spike():
    losses = np.append(noise(85, 0.02, 0) + 3.0, np.full(500, np.nan))
    with np.errstate(all="raise"):
        assert spikes(losses) == spikes_of_the_guard(losses) == [85]


def test_the_trials_have_spikes():
    counts = [len(spikes(with_spikes(seed))) for seed in range(25)]
    assert sum(counts) > 25 and max(counts) >= 3 and min(counts) == 0


def test_the_rule_is_that_of_the_settings():
    assert LEAST_SPREAD == SpikeGuard.LEAST_SPREAD
    assert spikes(np.empty(0)) == spikes(np.full(64, np.nan)) == []


def test_figures_of_a_run(tmp_path):
    steps = 300
    more = {
        "optim/skipped_steps": np.where(np.arange(steps) >= 200, 2.0, 0.0),
        "optim/grad_norm": np.where(np.arange(steps) == 70, 50.0, 1.5),
        "moe/dead_experts": np.where(np.arange(steps) >= 270, 4.0, 0.0),
    }
    losses = law(4096.0 * np.arange(1, steps + 1)) + noise(steps, 0.01, 0)
    losses[150:154] += 5.0
    losses[250] = np.nan
    write_run(tmp_path / "a", steps=steps, losses=losses, more=more)
    metrics = tmp_path / "a/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("NaN", "null"))  # as the tracker writes it
    with open(tmp_path / "a/tracking/journal.jsonl", "a") as journal:
        for kind in ("rewind", "resume", "rewind"):
            event = {"op": "event", "time": 2000.0, "step": 80, "kind": kind, "text": "spike"}
            journal.write(json.dumps(event) + "\n")
    found = summarize(read_folder(tmp_path / "a"))
    assert found.spikes == spikes_of_the_guard(losses, first=1) == [151, 251] and found.skipped == 2
    assert (found.resumes, found.rewinds) == (1, 2)
    assert found.grad_norm_median == 1.5 and found.grad_norm_largest == 50
    assert found.dead_experts == 4 and found.load_cv == pytest.approx(0.3)
    assert found.tokens == steps * TOKENS_PER_STEP
    assert found.exaflops == pytest.approx(steps * TOKENS_PER_STEP * FLOPS_PER_TOKEN / 1e18)
    assert found.hours == pytest.approx(steps * 9 / 3600, rel=1e-3)
    assert found.device_hours == pytest.approx(2 * found.hours)
    (validated,) = found.validations
    assert (validated.metric, validated.best_step, validated.last_step) == ("loss/val", 300, 300)
    assert found.mfu == 0.25 and found.status == "FINISHED" and math.isfinite(found.tokens_per_s)
