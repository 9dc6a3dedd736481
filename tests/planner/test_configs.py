"""The configurations that the planner made for machines that are not here: they are traced, and fit."""

from pathlib import Path

import pytest

from gptoss_dist.config import load_config
from gptoss_dist.planner.hardware import find_gpu, find_network
from gptoss_dist.planner.plan import Machines, make_plan
from gptoss_dist.train.objectives import next_token_prediction
from gptoss_dist.train.start import engine_settings

CONFIGS = Path(__file__).parents[2] / "configs"
CASES = [
    ("pretrain_20b_h100x64", 64, "h100-80gb", 2_097_152),
    pytest.param("pretrain_120b_h100x512", 512, "h100-80gb", 4_194_304, marks=pytest.mark.slow),
    pytest.param("continue_20b_h100x8", 8, "h100-80gb", 524_288, marks=pytest.mark.slow),
    pytest.param("finetune_20b_a100x8", 8, "a100-80gb", 262_144, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, devices, gpu, tokens", CASES)
def test_planned_configuration_fits(name, devices, gpu, tokens):
    config = load_config(CONFIGS / f"{name}.yaml")
    network = find_network("ib-400") if devices > 8 else None
    machines = Machines(devices, 8, find_gpu(gpu), network)
    plan = make_plan(
        engine_settings(config),
        config.data.seq_len,
        config.train.steps,
        machines,
        next_token_prediction,
        documents=config.data.masks_documents,
    )
    assert plan.tokens_per_step == tokens
    assert plan.layout.world_size == devices
    assert plan.fits and plan.needed > 0.5 * machines.limit, plan.needed
    # Master weights and moments are float32 and sharded: 12 bytes of each parameter, a few of padding.
    share = 12 * plan.parameters.total / plan.layout.shard
    held = plan.step.holds()
    assert share <= held["weights"] + held["optimizer"] <= 1.02 * share
    assert 0.1 < plan.mfu < 0.6
