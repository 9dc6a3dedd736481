"""A resumed run says what it does otherwise, and what follows."""

import json

from gptoss_dist.config import load_config
from gptoss_dist.train.changes import changes_of, describe_changes
from gptoss_dist.train.start import Start

SHORT = {"model.hidden_size": 64, "train.steps": 20, "optim.lr": 1e-3, "optim.warmup_steps": 2}


def described(now: dict, before: dict | None = None, step: int = 20, processes=(1, 1)) -> list[str]:
    old = json.loads(json.dumps(load_config(overrides=SHORT | (before or {})).to_dict()))  # as a checkpoint has it
    return describe_changes(old, load_config(overrides=SHORT | now), step, processes)


def test_nothing_is_said_of_a_run_that_goes_on_as_it_was():
    assert described({"run.name": "other", "resume": "auto", "checkpoint.dir": "x", "engine.kind": "fsdp"}) == []
    assert changes_of(Start(), load_config(overrides=SHORT), 1) == []


def test_more_steps_lift_the_learning_rate():
    assert described({"train.steps": 40}) == [
        "changed: train.steps 20 -> 40",
        "the learning rate of step 21 is 5.7e-04, where step 20 had 1.0e-04",
    ]
    constant = {"optim.schedule": "constant"}
    assert described({"train.steps": 40} | constant, constant) == ["changed: train.steps 20 -> 40"]


def test_another_peak_in_the_middle():
    assert described({"optim.lr": 2e-3}, step=10)[1] == (
        "the learning rate of step 11 is 1.2e-03, where it would have had 5.9e-04"
    )


def test_processes_and_batch():
    lines = described({"train.micro_batch_size": 4}, processes=(2, 1))
    assert lines[:2] == ["changed: train.micro_batch_size 8 -> 4", "changed: processes 2 -> 1"]
    assert lines[2].startswith("a step has 4 samples instead of 16") and "0.25 times as much data" in lines[2]
    assert described({"train.micro_batch_size": 16}, processes=(2, 1)) == [
        "changed: train.micro_batch_size 8 -> 16",
        "changed: processes 2 -> 1",
    ]


def test_each_setting_once_each_consequence_once():
    lines = described({"loss.aux_coef": 0.5, "loss.z_coef": 0.1, "train.precision": "fp32", "tracking.uri": "a:b@c"})
    assert lines == [
        "changed: train.precision 'bf16' -> 'fp32'",
        "changed: loss.aux_coef 0.01 -> 0.5",
        "changed: loss.z_coef 0.0 -> 0.1",
        "changed: tracking.uri",
        "losses differ by rounding",
        "the auxiliary losses and the gradients differ",
    ]
    assert described({"sampling.prompts": str(["x" * 1000])})[0].startswith("changed: sampling.prompts [] -> ['xxx")
    assert len(described({"sampling.prompts": str(["x" * 1000])})[0]) < 160


def test_settings_that_the_earlier_run_did_not_know():
    old = load_config(overrides=SHORT).to_dict()
    del old["checkpoint"]["keep_best"], old["sampling"]
    old["optim"]["gone"] = 5
    assert describe_changes(old, load_config(overrides=SHORT), 5, (None, 4)) == []
