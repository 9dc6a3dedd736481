"""With `train.find_non_finite` a skipped step says where its first value that is not finite arose."""

import shlex

import pytest
import torch
from torch import nn

from gptoss_dist.engine.non_finite import NonFiniteFinder
from gptoss_dist.tracking.recorded.run import read_run
from tests.support.ranks import run


def test_the_first_of_a_step_is_found_and_older_steps_are_forgotten():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    finder = NonFiniteFinder(model)
    finder.watch_gradients(model.named_parameters())
    x = torch.ones(1, 2)

    def step(number: int) -> None:
        finder.begin(number)
        model(x).sum().backward()

    step(1)
    assert finder.first(1) is None
    model[2].bias.data[1] = float("nan")
    step(2)
    assert str(finder.first(2)) == "in the output of 2" and finder.first(1) is None
    model[2].bias.data[1] = 0.0
    model[0].bias.register_hook(lambda gradient: gradient * float("inf"))
    model[0].weight.register_hook(lambda gradient: gradient * float("inf"))
    finder.watch_gradients([("again", model[0].bias)])
    step(3)
    assert str(finder.first(3)) == "in the gradient of again (all outputs were finite)"
    model.eval()
    finder.begin(4)
    model(x * float("nan"))  # a validation is no step
    assert finder.first(4) is None and finder.first(2) is None


POISONED = """
import sys

import torch

from gptoss_dist.train import loop
from launch.train import main

build, where, calls = loop.build_engine, sys.argv[-1], [0]


class Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def poison(module, inputs, output):
    calls[0] += module.training
    if calls[0] > 4:  # from step 3 on: there are two micro-batches
        return output * float("inf") if where == "output" else Infinite.apply(output)


def with_a_poisoned_rank(settings, ranks, objective):
    engine = build(settings, ranks, objective)
    if ranks.rank == 1:
        engine.model.blocks[1].self_attn.register_forward_hook(poison, prepend=True)
    return engine


loop.build_engine = with_a_poisoned_rank
sys.exit(main(sys.argv[1:-1]))
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "where"),
    [
        ([], "output"),
        ([], "gradient"),
        (["--engine.zero_stage", "2"], "gradient"),
        (["--engine.zero_stage", "3"], "output"),
    ],
    ids=["fsdp-output", "fsdp-gradient", "zero-2-gradient", "zero-3-output"],
)
def test_two_ranks_name_what_was_not_finite_first(settings, tmp_path, engine, where):
    script, folder = tmp_path / "script.py", tmp_path / "poisoned"
    script.write_text(POISONED)
    done = run(
        str(script),
        *shlex.split(
            f"--config {settings} --run.dir {folder} --validation.every 0 --train.find_non_finite true "
            "--train.max_skipped_steps 2"
        ),
        *engine,
        where,
        processes=2,
        expect=1,
    )
    said = [line for line in (folder / "log.txt").read_text().splitlines() if "was skipped; the first value" in line]
    assert len(said) == 2 and "step 3 was skipped" in said[0], done.stderr
    place = f"in the {where} of model.layers.1.self_attn"
    assert place in said[0], said
    assert where == "output" or "(all outputs were finite)" in said[0]
    assert "on rank 1" in said[0] or (where == "gradient" and not engine)  # FSDP sums gradients before they can be seen
    assert f"step 3 was skipped; the first value that is not finite is {place}" in done.stderr
    events = [(event.step, event.kind) for event in read_run(folder).events if event.kind != "checkpoint"]
    assert events == [(0, "start"), (3, "skipped"), (4, "skipped"), (4, "error")]
